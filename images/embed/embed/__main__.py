"""`python -m embed --help`: the embed job as a process."""

import logging

from embed.config import EmbedConfig
from embed.data import require_local
from estiba.contract import Job
from estiba.stop import Stop


def main() -> None:
    from estiba.workload import run

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("embed").setLevel(logging.INFO)

    def work(config: EmbedConfig, job: Job, stop: Stop) -> None:
        require_local(config.input_path)
        from embed.work import embed  # torch takes seconds to import; a mistake need not wait for it

        embed(config, job, stop)

    run(EmbedConfig, work)


if __name__ == "__main__":
    main()
