"""A process that has imported torch and forks toy workloads when told to: a tenth of a second each, not three.

Commands are JSON lines: {"words", "environ", "logs"} answers with a process id, {"wait"} with its exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from tensors import toy


def main() -> None:
    import torch
    import torch._dynamo
    import torch.distributed.nn  # both are imported by the first step of an optimizer or of two ranks

    warm = toy.Toy()
    for parameter in warm.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    warm.optimizer.step()
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _be_a_toy(**command)
        print(json.dumps(answer), flush=True)


def _be_a_toy(words: list[str], environ: dict[str, str], logs: list[str]) -> None:
    """Never returns."""
    code = 1
    try:
        for descriptor, path in enumerate(logs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environ)
        sys.argv = ["toy.py", *words]
        toy.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
