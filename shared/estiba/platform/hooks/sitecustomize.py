"""Python imports this in every interpreter below PID 1 of a script job, because its folder is first on PYTHONPATH.

Some scripts set PYTHONPATH anew, so in an image `estiba.pth` in Python's own packages runs this file as well.

It records in ESTIBA_RUN_DIR what PID 1 cannot see from outside: which processes have a rank, and how a Python program
ended whose exit status `| tee` or os.system swallows. PID 1 reads the records (`platform/outcomes.py`). The script
sees no difference. On a host without a GPU, `torchrun --nproc_per_node 0` starts one rank. Standard library only, and
no import of estiba, which the script's own interpreter need not have.
"""

from __future__ import annotations

import _sitebuiltins
import _thread
import atexit
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import CodeType, FrameType, ModuleType
from typing import Any

FOLDER = os.environ.get("ESTIBA_RUN_DIR", "")
RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
RANK_OWNER = "ESTIBA_RANK_OWNER"
"""In the environment of a rank's children, such as data loaders: they have the rank's variables and are no ranks."""
LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch")
INSTALLED = "_estiba_hooks"
_exit_code: Any = None
_record: dict[str, Any] = {}
_record_pid = 0
_ended_pid = 0


# --- records -------------------------------------------------------------------------------------------------------


def _write(name: str, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):
        path = os.path.join(FOLDER, name)
        with open(f"{path}.tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(content, file)
        os.replace(f"{path}.tmp", path)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, …; field 19 is the start time."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _new_record() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "start": int(_stat(pid)[19]),
        "started": time.time(),
        "program": " ".join(sys.argv[:1] if sys.argv[:1] != ["-m"] else sys.orig_argv[1:3]),
    }


def _register(rank: str | int) -> None:
    """Record that this process has a rank."""
    global _record, _record_pid
    if _record_pid == os.getpid() and "rank" in _record:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        _record, _record_pid = {**_new_record(), "rank": int(rank)}, os.getpid()
        os.environ[RANK_OWNER] = str(os.getpid())
        _write(f"rank-{os.getpid()}-{_record['start']}.json", _record)


def _ended(code: int, error: BaseException | None) -> None:
    """Record the end of this process: always for a rank, else if it failed or the job is stopping."""
    global _ended_pid
    if _ended_pid == os.getpid():  # a spawned child of multiprocessing also runs its exit handlers
        return
    is_rank = _record_pid == os.getpid() and "rank" in _record
    if not is_rank and code == 0 and not os.path.exists(os.path.join(FOLDER, "stopping")):
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        record = dict(_record) if is_rank else _new_record()
        record |= {"ended": time.time(), "code": code}
        if error is not None:
            record["exception"] = "".join(traceback.format_exception_only(type(error), error)).strip()
            frames = traceback.extract_tb(error.__traceback__)
            record["place"] = f"{frames[-1].filename} line {frames[-1].lineno}" if frames else None
        elif code and isinstance(_exit_code, str):  # sys.exit("what is wrong")
            record["exception"] = f"SystemExit: {_exit_code}"
        if not is_rank and code:
            record |= {"ancestors": _ancestors(), "piped_into_tee": _is_piped_into_tee()}
        _ended_pid = os.getpid()
        kind = "rank" if is_rank else "end"
        _write(f"{kind}-{record['pid']}-{record['start']}.json", record)


def _ancestors() -> list[int]:
    found = [os.getpid()]
    with contextlib.suppress(OSError, ValueError, IndexError):
        while found[-1] > 1:
            found.append(int(_stat(found[-1])[1]))
    return found[1:]


def _is_piped_into_tee() -> bool:
    """Whether this process writes into a pipe that `tee` reads: a pipeline's status is then tee's."""
    pipes = set()
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            pipes.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    pipes = {name for name in pipes if name.startswith("pipe:")}
    for folder in os.listdir("/proc") if pipes else []:
        if folder.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{folder}/comm") as file:
                    is_tee = file.read().strip() == "tee"
                if is_tee and os.readlink(f"/proc/{folder}/fd/0") in pipes:
                    return True
    return False


# --- how this process ends -----------------------------------------------------------------------------------------


def _code_of(status: Any) -> int:
    if status is None:
        return 0
    return status & 0xFF if isinstance(status, int) else 1


def _watch_end() -> None:
    before_hook, before_exit, before_exit_now = sys.excepthook, sys.exit, os._exit
    owner = os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if os.getpid() == owner:
            # Now, and not at exit, which may be seconds later: the first rank to raise is the reason.
            _ended(130 if isinstance(error, KeyboardInterrupt) else 1, error)
        before_hook(kind, error, trace)

    def leave(status: Any = None, /) -> Any:
        global _exit_code
        _exit_code = status
        before_exit(status)

    def leave_now(status: int) -> Any:
        with contextlib.suppress(Exception):
            if os.getpid() == owner:
                code = _code_of(status)
                is_rank = _record_pid == owner and "rank" in _record
                # Estiba's workloads end so while they handle the exception. From 128 on it is a signal's status.
                _ended(code, sys.exc_info()[1] if is_rank and 0 < code < 128 else None)
        before_exit_now(status)

    def at_exit() -> None:
        if os.getpid() != owner:  # a forked child that ends as a program of its own
            return
        error = getattr(sys, "last_value", None)  # set where a script replaced sys.excepthook
        _ended(_code_of(_exit_code) if error is None else 1, error)

    sys.excepthook, os._exit = hook, leave_now  # type: ignore[assignment]
    atexit.register(at_exit)
    if not _watch_raised_exit():
        sys.exit = leave  # type: ignore[assignment]
        _watch_quit()


def _watch_quit() -> None:
    """`exit(n)` and `quit(n)`, which raise SystemExit themselves. Python makes them after it has read estiba.pth."""
    quitter: Any = _sitebuiltins.Quitter
    before = quitter.__call__

    def leave(self: Any, code: Any = None) -> Any:
        global _exit_code
        _exit_code = code
        before(self, code)

    quitter.__call__ = leave


def _watch_raised_exit() -> bool:
    """Watch for a SystemExit that ends the program, whoever raised it. Python before 3.12 shows it to nobody.

    Returns whether it is watched. Otherwise what calls exit counts, even if the program catches it.
    """
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        return False
    main_thread = _thread.get_ident()

    def unwound(_code: CodeType, _offset: int, error: BaseException) -> None:
        """Called for each frame that an exception leaves; the outermost one of the main thread ends the program."""
        global _exit_code
        if isinstance(error, SystemExit) and _thread.get_ident() == main_thread:
            with contextlib.suppress(ValueError):
                if sys._getframe(1).f_back is None:
                    _exit_code = error.code

    tool = next((number for number in (4, 3, 2, 1, 0, 5) if monitoring.get_tool(number) is None), None)
    if tool is None:
        return False
    monitoring.use_tool_id(tool, "estiba")
    monitoring.register_callback(tool, monitoring.events.PY_UNWIND, unwound)
    monitoring.set_events(tool, monitoring.events.PY_UNWIND)
    return True


def _watch_end_of_multiprocessing_child() -> None:
    """A child of multiprocessing ends without atexit; its own finalizers run while its exception is in flight."""
    from multiprocessing import util

    def finalize() -> None:
        error = sys.exc_info()[1]
        if isinstance(error, SystemExit):
            cause = error.__context__  # torch.multiprocessing.spawn reports an exception, then exits
            _ended(_code_of(error.code), cause)
        else:
            _ended(0 if error is None else 1, error)

    util.Finalize(None, finalize, exitpriority=100)


# --- calls whose result the caller drops ---------------------------------------------------------------------------


def _is_dropped(frame: FrameType | None) -> bool:
    """Whether the caller's next instruction drops the result: the call is a statement of its own."""
    if frame is None:
        return False
    import dis

    # A frame's position may be inside the caches that follow the call.
    following = (one for one in dis.get_instructions(frame.f_code) if one.offset > frame.f_lasti)
    return next((one.opname for one in following), None) == "POP_TOP"


def _watch_call(module: Any, name: str, code_of: Callable[[Any], int]) -> None:
    call = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        started = time.time()
        result = call(*args, **kwargs)
        with contextlib.suppress(Exception):
            code = code_of(result)
            if code and _is_dropped(sys._getframe(1)):
                command = args[0] if args else kwargs.get("command", kwargs.get("args", ""))
                text = command if isinstance(command, str) else " ".join(map(os.fsdecode, command))
                record = {"pid": os.getpid(), "started": started, "ended": time.time(), "code": code, "command": text}
                _write(f"dropped-{os.getpid()}-{time.time_ns()}.json", record)
        return result

    watched.__name__, watched.__doc__, watched.__wrapped__ = name, call.__doc__, call  # type: ignore[attr-defined]
    setattr(module, name, watched)


def _shell_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


# --- torch ---------------------------------------------------------------------------------------------------------


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module after its first import."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.actions = actions

    def find_spec(self, name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> Any:
        action = self.actions.pop(name, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(name) if path is None else importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            with contextlib.suppress(Exception):
                action(module)

        with contextlib.suppress(AttributeError):
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _watch_process_group(module: Any) -> None:
    """Scripts that start their ranks themselves set RANK too late to be seen from outside."""
    init = module.init_process_group

    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        result = init(*args, **kwargs)
        with contextlib.suppress(Exception):
            if _record_pid != os.getpid() and module.get_world_size() > 1:
                _register(module.get_rank())
                if sys.modules.get("multiprocessing.process") is not None:
                    import multiprocessing

                    if multiprocessing.parent_process() is not None:
                        _watch_end_of_multiprocessing_child()
        return result

    init_process_group.__doc__, init_process_group.__wrapped__ = init.__doc__, init  # type: ignore[attr-defined]
    module.init_process_group = init_process_group


def _let_workers_save(module: Any) -> None:
    """After one worker ended, torchrun kills the others 30 s after its TERM, whatever its shutdown timeout says."""
    module.PContext.close.__defaults__ = (None, int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]))


def _start_a_rank_without_gpu() -> None:
    """`--nproc_per_node $SM_NUM_GPUS`, which is 0 on a host without a GPU, means one rank there."""
    words = sys.orig_argv[1:3]
    is_launcher = any(name in words for name in LAUNCHERS) or os.path.basename(sys.argv[0]) == "torchrun"
    if not is_launcher:
        return
    for index, word in enumerate(sys.argv):
        flag, sign, value = word.replace("-", "_").partition("=")
        if flag != "__nproc_per_node":
            continue
        if sign and value == "0":
            sys.argv[index] = "--nproc_per_node=1"
        elif not sign and sys.argv[index + 1 : index + 2] == ["0"]:
            sys.argv[index + 1] = "1"


# --- installation --------------------------------------------------------------------------------------------------


def _import_next() -> None:
    """Run the sitecustomize that this one hides, such as Debian's."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _install() -> None:
    if __name__ == "sitecustomize":  # not from estiba.pth
        _import_next()
    if not os.path.isdir(FOLDER) or getattr(sys, INSTALLED, None) == FOLDER:
        return
    setattr(sys, INSTALLED, FOLDER)
    _watch_end()
    _watch_call(os, "system", _shell_code)
    _watch_call(subprocess, "call", lambda code: code if code >= 0 else 128 - code)
    _watch_call(subprocess, "run", lambda done: done.returncode if done.returncode >= 0 else 128 - done.returncode)
    actions: dict[str, Callable[[ModuleType], None]] = {"torch.distributed.distributed_c10d": _watch_process_group}
    if os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "").isdigit():
        actions["torch.distributed.elastic.multiprocessing.api"] = _let_workers_save
    sys.meta_path.insert(0, _AfterImport(actions))
    if os.environ.get("ESTIBA_GPU_COUNT") == "0":
        _start_a_rank_without_gpu()
    if RANK_OWNER not in os.environ:
        rank = next((os.environ[name] for name in RANK_NAMES if os.environ.get(name)), None)
        if rank is not None:
            _register(rank)
            if os.environ.get("ESTIBA_GPU_COUNT") == "0":
                # PID 1 may have set 1, for launchers. A rank asks by it whether there is a GPU.
                os.environ["SM_NUM_GPUS"] = "0"


with contextlib.suppress(Exception):  # a script must never fail because of this
    _install()
