"""`python -m new_image --help`."""

from estiba.platform.workload import main
from new_image.config import TextConfig

if __name__ == "__main__":
    main(TextConfig, "new_image.train:train")
