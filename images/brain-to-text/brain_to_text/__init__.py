"""Brain to text: phonemes out of neural activity, trained on HDF5 straight from S3."""
