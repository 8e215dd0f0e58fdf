"""The command `estiba`."""

from __future__ import annotations

from estiba_launch.cli import process


def main() -> None:
    process.start()
    from estiba_launch.cli.app import app

    app()


if __name__ == "__main__":
    main()
