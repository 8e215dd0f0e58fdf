"""From HDF5 files to training batches: schema, indexing, validation, sampler, reading, collate, batches, augment."""
