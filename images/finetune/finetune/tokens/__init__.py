"""Records to token sequences with trained positions, and token sequences to micro-batches."""
