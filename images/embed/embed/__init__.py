"""The embed image: parquet text to embeddings."""
