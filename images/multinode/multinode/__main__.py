"""`python -m multinode --model ...` trains; `python -m multinode COMMAND` runs another command."""

from estiba.platform import workload
from multinode.config import MultinodeConfig

if __name__ == "__main__":
    workload.main(MultinodeConfig, "multinode.train:train", commands="multinode.commands:COMMANDS")
