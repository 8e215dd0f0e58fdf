"""The command `estiba`."""

from __future__ import annotations

import sys

from estiba_launch.cli import process
from estiba_launch.errors import EXIT_JOB_FAILED


def main() -> None:
    process.start()
    from estiba_launch.cli.app import app
    from estiba_launch.cli.options import say_os_error

    try:
        app()
    except OSError as error:
        # Of a command's output its own wrapper says so; this is for --help.
        say_os_error(error)
        sys.exit(EXIT_JOB_FAILED)


if __name__ == "__main__":
    main()
