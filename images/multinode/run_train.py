"""The default script: `python run_train.py --model DIR` runs `python -m multinode --model DIR`.

As an entry point in a `source_dir` of your own, copy this file or write your own `run_train.py`; the image runs either.
"""

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "multinode", *sys.argv[1:]])
