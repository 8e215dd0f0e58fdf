"""`python -m brain_to_text --s3-bucket … --s3-data-prefix …` trains; `evaluate` and `generate` help.

train_model_sagemaker.py is the same by the guide's name.
"""

from __future__ import annotations

import sys

from brain_to_text.config import BrainConfig
from estiba.contract import Job
from estiba.stop import Stop


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        from brain_to_text.commands import run

        run(arguments)

    from estiba import workload

    def work(config: BrainConfig, job: Job, stop: Stop) -> None:
        from brain_to_text.work import train  # torch takes seconds to import; a mistake need not wait for it

        train(config, job, stop)

    workload.run(BrainConfig, work)


if __name__ == "__main__":
    main()
