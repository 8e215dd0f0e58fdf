"""Parquet files (`files`), ranges of text (`rows`), and the chunks of vectors that a resume reuses (`chunks`)."""
