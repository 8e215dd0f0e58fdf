"""The guide's entry point, by its name: `python train_tensordock.py --dataset_path …` is `python -m aura`."""

from aura.__main__ import main

if __name__ == "__main__":
    main()
