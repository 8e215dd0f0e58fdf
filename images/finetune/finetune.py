"""The fine-tuning document's program: `python finetune.py --base_model ...` runs `python -m finetune --base_model ...`.

In a job's `code` it is first on Python's path, where it must not be imported in place of the package of the same name,
neither by this process nor by those that it starts.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    folders = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one and Path(one).resolve() != here]
    if (here / "finetune").is_dir():
        folders.insert(0, str(here))
    os.environ |= {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    os.execv(sys.executable, [sys.executable, "-m", "finetune", *sys.argv[1:]])
