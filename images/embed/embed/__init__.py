"""Parquet text to embeddings. Read config, data, model, pipeline, pool, state, artifacts, job, in this order."""
