"""The tokenizer guide's program: `python run.py --input-path ./samples/parquet --output-path ./output`."""

import sys
from pathlib import Path

# In a checkout the packages are beside this file and in shared/, in the image one folder up.
here = Path(__file__).resolve().parent
folders = (here, here.parent, here.parent.parent / "shared")
sys.path[:0] = [str(folder) for folder in folders if (folder / "embed").is_dir() or (folder / "estiba").is_dir()]

from embed.config import EmbedConfig  # noqa: E402
from estiba.platform.workload import main  # noqa: E402

if __name__ == "__main__":
    main(EmbedConfig, "embed.job:embed")
