"""`python -m aura --dataset_path …` trains; `aura plan`, `aura tokenizer train`, `aura export`, `aura sample` help.

train_tensordock.py is the same by the guide's name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from aura.config import AuraConfig
from estiba.contract import Job
from estiba.errors import ConfigError
from estiba.stop import Stop


def main() -> None:
    from estiba import workload

    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        from aura.commands import run

        run(arguments)
    if not any(item in ("-h", "--help") for item in arguments):
        _share(arguments)

    def work(config: AuraConfig, job: Job, stop: Stop) -> None:
        from aura.sources import find_sources

        find_sources(config.dataset_path)
        if config.resume_from is not None and "://" not in config.resume_from and not Path(config.resume_from).exists():
            raise ConfigError(
                f"--resume-from {config.resume_from}: there is nothing; give a checkpoint directory or a .pt file"
            )
        from aura.work import train  # torch takes seconds to import; a mistake need not wait for it

        train(config, job, stop)

    workload.run(AuraConfig, work)


def _share(arguments: list[str]) -> None:
    """With several GPUs, one process each; this one then only waits. A mistake in the flags is told by one."""
    import os

    from estiba.config import load
    from estiba.errors import EstibaError

    try:
        config = load(AuraConfig, argv=arguments, environ=os.environ, hyperparameters=Job.read().hyperparameters)
    except EstibaError:
        return
    from estiba.loop.processes import run_each, wanted

    count = 1 if config.device else wanted(config.processes)
    if config.device and config.processes:
        count = wanted(config.processes)
    if count > 1:
        run_each("aura", arguments, count)


if __name__ == "__main__":
    main()
