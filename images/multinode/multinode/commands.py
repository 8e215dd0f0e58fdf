"""The image's other commands: `multinode convert`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from estiba.errors import ConfigError, first_line
from estiba.log import get_logger
from estiba.paths import writable

logger = get_logger(__name__)


def convert(argv: list[str]) -> None:
    """Write a GGUF file as a directory with config.json, safetensors (bfloat16) and a tokenizer. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="multinode convert", description=convert.__doc__)
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    options = parser.parse_args(argv)
    if not options.gguf.is_file():
        raise ConfigError(f"{options.gguf}: no such file; give a GGUF file")
    folder = writable(options.out, "--out")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from multinode.artifacts import write_weights

    logging.set_verbosity_error()  # it advises on computing with packed weights
    source = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"{options.gguf}: transformers cannot read it ({first_line(error)}); give another file"
        ) from None
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):  # what is written is not in 4 bits any more
        del model.config.quantization_config
    model.config.to_json_file(folder / "config.json")
    tokenizer.save_pretrained(folder)
    write_weights(dict(model.named_parameters()), torch.bfloat16, folder)
    logger.info(f"{folder}: {type(model).__name__}, {model.num_parameters():,} parameters")


COMMANDS = {"convert": convert}
