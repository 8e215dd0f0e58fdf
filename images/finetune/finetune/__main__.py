"""`python -m finetune --base_model ...` trains; `python -m finetune COMMAND` runs another command."""

from estiba.platform import workload
from finetune.config import FinetuneConfig

if __name__ == "__main__":
    workload.main(FinetuneConfig, "finetune.train:train", commands="finetune.commands:COMMANDS")
