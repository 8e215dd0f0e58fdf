"""All commands except training.

brain-to-text evaluate --model out/model --dataset-dir data --output-dir evaluation
brain-to-text generate --out data --sessions 4 --trials 60
brain-to-text index s3://bucket/prefix
brain-to-text show-config --config-file rnn_args.yaml
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import yaml

from estiba.config import load
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.platform.workload import Commands


def _evaluate(arguments: list[str]) -> None:
    from brain_to_text.evaluate_config import EvaluateConfig

    config = load(EvaluateConfig, argv=arguments, environ=None, hyperparameters=None, prog="brain-to-text evaluate")
    from brain_to_text.evaluate import evaluate  # imports torch, which --help does not need

    evaluate(config, Stop.from_environment().install())


def _generate(arguments: list[str]) -> None:
    from brain_to_text.synthetic.generator import GenerateConfig, generate

    config = load(GenerateConfig, argv=arguments, environ=None, hyperparameters=None, prog="brain-to-text generate")
    print(generate(config))


def _index(arguments: list[str]) -> None:
    """Index the HDF5 files that have no index yet, and list all of them."""
    from brain_to_text.data.indexing.index import find_objects, open_indexes
    from estiba.storage import open_store

    parser = argparse.ArgumentParser(prog="brain-to-text index", description=_index.__doc__)
    parser.add_argument("location", help="folder of the sessions: s3://BUCKET/PREFIX, file:///DIR or a directory")
    parser.add_argument("--index-path", help="keep the index here instead of next to the data")
    parser.add_argument("--rebuild", action="store_true", help="index files again that have an index")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    store = open_store(options.location)
    indexes = open_indexes(
        options.location, find_objects(store), store=store, index_path=options.index_path, rebuild=options.rebuild,
        workers=options.workers, stop=Stop().install(),
    )  # fmt: skip
    for index in indexes:
        print(f"{index.path}  {len(index.trials)} trials, {len(index.problems)} that cannot be read  {index.version}")


def _show_config(arguments: list[str]) -> None:
    """Print the settings that training would use on this machine, in a form that --config-file accepts."""
    from brain_to_text.config import BrainConfig
    from brain_to_text.yaml_config import to_sections

    class ShowConfig(BrainConfig):
        """Print the settings that training would use with these flags, environment variables and hyperparameters."""

    config = load(
        ShowConfig,
        argv=arguments,
        environ=os.environ,
        hyperparameters=Job.read().hyperparameters,
        prog="brain-to-text show-config",
    )
    portable, machine_specific = config.run_settings()
    print(_yaml(to_sections(config.training_settings(), config.sessions)))
    print("# Paths, reading, and which checkpoints to keep.\n" + _yaml(portable), end="")
    print("# Specific to this machine; defaults differ elsewhere.")
    print("".join(f"# {line}\n" for line in _yaml(machine_specific).splitlines()), end="")


def _yaml(values: dict[str, Any]) -> str:
    return str(yaml.safe_dump(values, sort_keys=False)) if values else ""


COMMANDS: Commands = {"evaluate": _evaluate, "generate": _generate, "index": _index, "show-config": _show_config}
