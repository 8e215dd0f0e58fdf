"""The guide's entry point: `python train_model_sagemaker.py --s3-bucket …` is `python -m brain_to_text …`."""

from brain_to_text.__main__ import main

if __name__ == "__main__":
    main()
