"""Slurm: a batch file, printed for `sbatch`."""
