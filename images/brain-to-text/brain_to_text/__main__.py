"""`python -m brain_to_text --flags` trains; `python -m brain_to_text COMMAND` runs another command."""

from brain_to_text.config import BrainConfig
from estiba.platform import workload

if __name__ == "__main__":
    workload.main(BrainConfig, "brain_to_text.train:train", commands="brain_to_text.commands:COMMANDS")
