"""The command `estiba-stage`."""

from __future__ import annotations

import argparse
import os
import sys

from estiba.errors import ConfigError, EstibaError
from estiba.log import get_logger

logger = get_logger("estiba.staging")
DESCRIPTION = """\
Copy a model or data set between S3 and local files: in parallel, verified, resumable.

  estiba-stage s3://BUCKET/models/llama /tmp/llama      on every host of a job: each byte leaves S3 once, and the
                                                        hosts exchange the rest
  estiba-stage /opt/ml/model s3://BUCKET/results        a directory or a file to S3
  estiba-stage hf://ORG/NAME s3://BUCKET/models/name    a model of the hub to S3; hf://ORG/NAME@REVISION

Run the same command again to resume.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="estiba-stage", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="s3://BUCKET/PREFIX, one object, a local path, or hf://ORG/NAME")
    parser.add_argument("target", metavar="DST", help="a local directory, or s3://BUCKET/PREFIX")
    parser.add_argument("--alone", action="store_true", help="do not share the work with the job's other hosts")
    parser.add_argument("--no-cache", action="store_true", help="do not use the warm pool's cache")
    parser.add_argument("--connections", type=int, metavar="N", help="connections to S3 (8 to 128, by cores and size)")
    options = parser.parse_args(argv)
    if options.connections is not None and options.connections < 1:
        parser.error(f"argument --connections: {options.connections} is not a positive number")
    try:
        run(options)
    except EstibaError as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.info("interrupted; run the same command again to resume")
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    source, target = options.source, options.target
    is_from_s3, is_to_s3 = source.startswith("s3://"), target.startswith("s3://")
    if source.startswith("hf://"):
        from estiba.staging.hub import upload_model

        upload_model(source, target)
    elif is_to_s3 and not is_from_s3:
        from estiba.staging.uploads import upload

        upload(source, target)
    elif is_from_s3 and not is_to_s3:
        from estiba.staging.run import stage

        stage(source, target, alone=options.alone, use_cache=not options.no_cache, connections=options.connections)
    else:
        raise ConfigError(f"{source} to {target}: one of them must be on S3 (s3://BUCKET/PREFIX), and the other not")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a dead peer do not hold the command
