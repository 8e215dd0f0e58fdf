"""What every command shares: errors as messages and exit codes, where text goes, and the flags they have in common."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from . import jobfile, prices, scripts
from .errors import EXIT_INTERRUPTED, LaunchError
from .forecast import Assumptions

Call = TypeVar("Call", bound=Callable[..., Any])


def command(function: Call) -> Call:
    """Turn LaunchError and Ctrl-C into a message on stderr and an exit code; no traceback reaches a person."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LaunchError as error:
            say(f"estiba: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # `estiba list | head`: the reader has what it wanted.
            sys.stdout = None
            raise typer.Exit(0) from None

    return wrapped  # type: ignore[return-value]


def say(text: str) -> None:
    """One message for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, such as images/embed/job.yaml.")]
TargetName = Annotated[
    str | None, typer.Option("--target", metavar="TARGET", help="local, sagemaker or ssh://user@host[:port].")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Value of a ${VARIABLE}; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
PriceFile = Annotated[Path | None, typer.Option("--prices", metavar="FILE", help="Price table laid over the others.")]
Region = Annotated[
    str | None, typer.Option("--region", envvar=["AWS_REGION", "AWS_DEFAULT_REGION"], help="Region of the prices.")
]
Interruptions = Annotated[float, typer.Option(help="Forecast: spot interruptions an hour.")]
SaveSeconds = Annotated[float, typer.Option("--save-s", help="Forecast: seconds one checkpoint takes.")]
NoticeSaves = Annotated[float, typer.Option(help="Forecast: chance that the notice is long enough to save (0-1).")]
WorkSeconds = Annotated[
    float | None, typer.Option("--work-s", help="Forecast: seconds of work; default is 70% of the limit.")
]
Gpus = Annotated[str, typer.Option(help="auto (all if this machine has any), all, none or a number.")]
ShmSize = Annotated[str, typer.Option(help="Shared memory of each host.")]
Memory = Annotated[str | None, typer.Option(help="Memory limit of each host, such as 16g.")]
Cpus = Annotated[float | None, typer.Option(help="CPU limit of each host.")]
LikeInstance = Annotated[
    bool, typer.Option("--like-instance", help="Limit each host to the memory and vCPUs of its instance type.")
]
Encoding = Annotated[str, typer.Option(help="Hyperparameters as plain text (SDK v3) or json (SDK v2).")]
EnvFile = Annotated[
    Path | None, typer.Option("--env-file", metavar="FILE", help="NAME=VALUE lines for the container; never stored.")
]


def assume(interruptions: float, save_s: float, notice_saves: float, work_s: float | None) -> Assumptions:
    try:
        return Assumptions(
            interruptions_per_hour=interruptions, save_s=save_s, notice_saves=notice_saves, work_s=work_s
        )
    except ValueError as error:
        raise LaunchError(f"forecast: {error}") from None


def host_options(
    loaded: jobfile.JobFile,
    gpus: str,
    shm_size: str,
    memory: str | None,
    cpus: float | None,
    like_instance: bool,
    encoding: str,
    env_file: Path | None,
    tables: prices.Prices,
) -> scripts.HostOptions:
    """What the machine gives each host, from the flags. Raises LaunchError for flags that make no sense."""
    return scripts.read_options(
        gpus=gpus,
        shm_size=shm_size,
        memory=memory,
        cpus=cpus,
        encoding=encoding,
        env_file=str(env_file.absolute()) if env_file else None,
        like=tables.get(prices.hosts_of(loaded.request)[0][0]) if like_instance else None,
        has_gpu_instance=loaded.target.kind == "ssh",
    )
