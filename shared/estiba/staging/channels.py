"""Stage what the request's ESTIBA_STAGE_<CHANNEL> variables name. PID 1 runs this before the script or the workload."""

from __future__ import annotations

import json
import os
import sys

from estiba.errors import EstibaError
from estiba.log import get_logger
from estiba.platform.contract import Job, root_of
from estiba.platform.failure import write_failure
from estiba.platform.staged_channels import targets

logger = get_logger("estiba.staging.channels")  # its __name__ is __main__


def main() -> int:
    from estiba.staging.run import stage

    try:
        job = Job.read()
        for name, (url, folder) in targets(os.environ, job, _configured()).items():
            logger.info("staging channel %s from %s", name, url)
            stage(url, f"{folder}/", job=job)
    except EstibaError as error:
        logger.error("%s", error)
        write_failure(root_of() / "output/failure", str(error))
        return error.exit_code
    return 0


def _configured() -> dict[str, object]:
    try:
        value = json.loads((root_of() / "input/config/inputdataconfig.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Job.read has reported a broken one
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a dead peer do not hold the job
