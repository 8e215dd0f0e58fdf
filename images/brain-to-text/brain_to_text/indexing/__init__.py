"""Where every trial lies in HDF5 files: found once, kept, and values made of bytes."""
