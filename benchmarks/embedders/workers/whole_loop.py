"""The original's way: read, encode and write each file of a folder. `python whole_loop.py MODEL INPUT OUTPUT`."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
for path in sorted(Path(sys.argv[2]).glob("*.parquet")):
    table = pq.read_table(path)
    vectors = model.encode(table["texto"].to_pylist(), batch_size=32, show_progress_bar=False)
    pq.write_table(table.append_column("embeddings", pa.array(vectors.tolist())), Path(sys.argv[3]) / path.name)
