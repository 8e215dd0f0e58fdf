"""`python -m new_image --help`."""

from estiba.platform.workload import main
from new_image.config import CountConfig

if __name__ == "__main__":
    main(CountConfig, "new_image.job:count")
