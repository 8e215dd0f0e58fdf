"""`python -m embed --help`."""

from embed.config import EmbedConfig
from estiba.platform.workload import main

if __name__ == "__main__":
    main(EmbedConfig, "embed.job:embed")
