"""`python -m aura --dataset_path ...` trains; `python -m aura COMMAND` runs another command."""

from aura.config import AuraConfig
from estiba.platform import workload

if __name__ == "__main__":
    workload.main(AuraConfig, "aura.train:train", commands="aura.commands:COMMANDS")
