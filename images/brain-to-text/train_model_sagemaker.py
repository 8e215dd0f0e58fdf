"""The guide's entry point: `python train_model_sagemaker.py --s3-bucket ...` is `python -m brain_to_text ...`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("brain_to_text", run_name="__main__", alter_sys=False)
