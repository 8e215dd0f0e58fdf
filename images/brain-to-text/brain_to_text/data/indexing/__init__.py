"""The byte index: one scan of an HDF5 file records where every trial is stored, so reading needs no HDF5 library."""
