"""The options of all commands, each defined once, and the decorator that turns a function into a command."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer import Argument, Option

from estiba_launch.cli import process
from estiba_launch.errors import EXIT_INTERRUPTED, EXIT_JOB_FAILED, LaunchError, did_you_mean
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import jobfile, prices
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.options import HostOptions, read_options
from estiba_launch.request.variables import parse_settings
from estiba_launch.targets import registry

DEVICE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
TARGET_HELP = f"{registry.forms()}."

JobPath = Annotated[Path, Argument(metavar="JOB", help="Job file, such as images/embed/job.yaml.")]
JobName = Annotated[str | None, Argument(metavar="[NAME]", help="Job name; default: the latest job.")]
Target = Annotated[str, Option(metavar="TARGET", help=TARGET_HELP, envvar="ESTIBA_TARGET")]
OptionalTarget = Annotated[str | None, Option(metavar="TARGET", help=TARGET_HELP)]
AccountTarget = Annotated[
    str | None, Option(metavar="TARGET", help="sagemaker or ssh: include jobs that were started elsewhere.")
]
Settings = Annotated[
    list[str] | None, Option("--set", metavar="NAME=VALUE", help="Value of a ${VARIABLE}; may be repeated.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON document.")]
Region = Annotated[str | None, Option(envvar=["AWS_REGION", "AWS_DEFAULT_REGION"], help="AWS region.")]
Role = Annotated[str | None, Option(metavar="NAME|ARN", help="SageMaker: execution role of the job; sets ROLE_ARN.")]
SyncEvery = Annotated[float, Option(min=0.05, help="Seconds between checkpoint syncs.")]


@dataclass(frozen=True, kw_only=True)
class HostFlags(HostOptions):
    gpus: Annotated[str, Option(help="auto (all GPUs of the machine, if any), all, none or a number.")] = "auto"
    like_instance: Annotated[
        bool, Option("--like-instance", help="Limit each host to the memory and vCPUs of its instance type.")
    ] = False

    def read(self, job: JobFile, table: prices.Prices) -> HostOptions:
        """Check the flags for `job`. Raises LaunchError."""
        flags = vars(self) | {"env_file": self.env_file and str(Path(self.env_file).absolute())}
        like = table.get(prices.hosts_of(job.request)[0][0]) if flags.pop("like_instance") else None
        return read_options(**flags, like=like, remote=not job.target.runs_here and not job.target.on_aws)


@dataclass(kw_only=True)
class PriceFlags:
    price_file: Annotated[
        Path | None, Option("--prices", metavar="FILE", help="Price table that overrides the others.")
    ] = None
    region: Region = None

    def load(self, job: JobFile | None = None) -> prices.Prices:
        return prices.load(self.region_of(job) or "us-east-1", self.price_file)

    def region_of(self, job: JobFile | None = None) -> str | None:
        """Where AWS runs and bills the job: as its client finds it, else where the image is."""
        if job is not None and not job.target.on_aws:
            return self.region
        return prices.region_of(job.request if job else {}, self.region)


@dataclass(kw_only=True)
class HostPriceFlags(PriceFlags):
    usd_per_h: Annotated[
        float | None,
        Option(min=0, help="Price of all hosts, for --max-cost and cost: of the remote host, or instead of the table."),
    ] = None


@dataclass(kw_only=True)
class RunFlags:
    target: Target = "local"
    yes: Annotated[bool, Option("--yes", "-y", help="Start without asking.")] = False
    detach: Annotated[bool, Option("--detach", "-d", help="Return once the job has started.")] = False
    max_cost: Annotated[
        float | None, Option(min=0, metavar="USD", help="Refuse (exit 3) a job that may cost more.")
    ] = None
    fallback: Annotated[str | None, Option(metavar="local", help="Run here if AWS is unreachable or refuses.")] = None
    copy_inputs: Annotated[
        bool, Option("--copy-inputs", help="Copy File channels for each host instead of mounting them read-only.")
    ] = False
    sync_every_s: SyncEvery = 5.0
    keep_hosts: Annotated[bool, Option("--keep-hosts", help="Keep the directories of finished hosts.")] = False

    def options(self, host: HostOptions, cost: HostPriceFlags) -> SubmitOptions:
        return SubmitOptions(
            host=host,
            region=cost.region,
            usd_per_h=cost.usd_per_h,
            copy_inputs=self.copy_inputs,
            sync_every_s=self.sync_every_s,
            keep_hosts=self.keep_hosts,
        )


def settings_for(job: Path, assignments: list[str] | None) -> dict[str, str]:
    """The values of --set. Warns about a name that the job file does not use. Raises LaunchError."""
    values = parse_settings(assignments)
    used = set(re.findall(r"\$\{(\w+)", jobfile.read_text(job)))
    for name in values.keys() - used:
        hint = did_you_mean(name, used, f"it uses {', '.join(sorted(used)) or 'no variables'}")
        say(f"warning: --set {name}: {job} does not use ${{{name}}}; {hint}")
    return values


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command. A dataclass parameter becomes one option per annotated field.

    LaunchError and Ctrl-C become a message on stderr and an exit code.
    """
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    groups = {one.name: _fields(one.annotation) for one in parameters if dataclasses.is_dataclass(one.annotation)}
    options = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in parameters
        for option in groups.get(one.name, [one])
    ]

    def wrapped(**values: Any) -> None:
        try:
            with process.graceful_interrupt():
                _refuse_non_finite(values)
                for one in parameters:
                    if one.name in groups:
                        group = {option.name: values.pop(option.name) for option in groups[one.name]}
                        values[one.name] = one.annotation(**group)
                function(**values)
                print(end="", flush=True)
        except LaunchError as error:
            say(f"estiba: {error}")
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, typer.Abort):
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader has closed the pipe, as in `estiba list | head`.
            drop_stdout()
            raise typer.Exit(0) from None
        except OSError as error:
            say_os_error(error)
            raise typer.Exit(EXIT_JOB_FAILED) from None

    wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
    wrapped.__annotations__ = {option.name: option.annotation for option in options}
    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return wrapped


def _refuse_non_finite(values: dict[str, Any]) -> None:
    for name, value in values.items():
        # A limit of NaN would never be reached, since every comparison with it is false.
        if isinstance(value, float) and not math.isfinite(value):
            raise LaunchError(f"--{name.replace('_', '-')} {value}: not a finite number; write for example 1.5")


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
        if hasattr(hints[field.name], "__metadata__")
    ]


def say(text: str) -> None:
    """Print a message for the user on stderr."""
    with contextlib.suppress(OSError):  # A closed or full stderr must not end the command.
        print(text, file=sys.stderr, flush=True)


def show(value: Any) -> None:
    """Print data on stdout: text unchanged, anything else as JSON."""
    ascii_only = getattr(sys.stdout, "encoding", None) not in (None, "utf-8")
    print(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=ascii_only), flush=True)


def say_os_error(error: OSError) -> None:
    """Say which file cannot be used, or that stdout's device is full or broken. Raises any other error again."""
    if error.filename is not None:
        # Such as `estiba fetch --into` a read-only folder.
        say(f"estiba: {error.filename}: {error.strerror}; correct the path, its permissions or the space there")
        return
    if error.errno not in DEVICE_ERRORS:
        raise error
    drop_stdout()
    say(f"estiba: cannot write ({error.strerror}); free some space, or send the output elsewhere")


def drop_stdout() -> None:
    """Stop writing to a stdout that has failed, also at exit."""
    sys.stdout = None  # type: ignore[assignment]
