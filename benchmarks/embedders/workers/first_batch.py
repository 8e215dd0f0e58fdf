"""Load our Encoder and embed one batch of texts: `python first_batch.py MODEL TEXTS.json`."""

import json
import sys
from pathlib import Path

from embed.config import EmbedConfig  # type: ignore[import-not-found]
from embed.model import Encoder  # type: ignore[import-not-found]

encoder = Encoder(EmbedConfig(model=sys.argv[1], device="cpu"))
texts = json.loads(Path(sys.argv[2]).read_text("utf-8"))[:8]
encoder.encode(encoder.tokenize(texts))
