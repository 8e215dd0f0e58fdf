"""Brain to text: decode phonemes from neural activity, trained on HDF5 read straight from S3."""
