"""`python -m embed --help`: the embed job as a process."""

import logging

from embed.config import EmbedConfig


def main() -> None:
    from estiba.workload import run

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("embed").setLevel(logging.INFO)

    def work(*arguments: object) -> None:
        from embed.work import embed  # torch takes seconds to import; a mistake in a flag need not wait for it

        embed(*arguments)  # type: ignore[arg-type]

    run(EmbedConfig, work)


if __name__ == "__main__":
    main()
