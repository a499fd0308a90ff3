"""Finished vectors in other tools: python examples/open_vectors.py OUTPUT

OUTPUT is what `llm2vec-fast embed` wrote (float16 or float32, --output-format parquet). Each part
below stands for itself; a tool that is not installed is skipped with a hint.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

shards = f"{sys.argv[1]}/part-*.parquet"

# pyarrow, a core dependency. A row of status 'error' has no vector, an empty text a zero one. The
# files are named one by one, because manifest.json in the same directory is no Parquet file.
paths = sorted(Path(sys.argv[1]).glob("part-*.parquet"))
table = pq.read_table(paths, filters=[("status", "not in", ["error", "empty"])])
width = table.schema.field("embedding").type.list_size
flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table["embedding"].chunks])
vectors = flat.reshape(-1, width).astype(np.float32)
print(f"pyarrow: {len(vectors)} vectors of {width} dimensions")

try:
    import polars as pl

    frame = pl.scan_parquet(shards).group_by("status").agg(pl.len(), pl.sum("n_tokens"))
    print(f"polars: {frame.collect().sort('status').rows()}")
except ImportError:
    print("polars: pip install polars")

try:
    import duckdb

    longest = f"select id, n_tokens from '{shards}' order by n_tokens desc, id limit 1"
    print(f"duckdb: the longest document is {duckdb.sql(longest).fetchall()[0]}")
except ImportError:
    print("duckdb: pip install duckdb")

try:
    import faiss

    faiss.normalize_L2(vectors)  # inner products are cosines then
    index = faiss.IndexFlatIP(width)  # exact; IndexHNSWFlat or IndexIVFPQ for millions
    index.add(vectors)
    scores, rows = index.search(vectors[:1], 3)
    ids = table["id"].take(rows[0][rows[0] >= 0]).to_pylist()
    print(f"faiss: nearest to {ids[0]} are {ids[1:]}, cosines {scores[0][1:].round(3).tolist()}")
except ImportError:
    print("faiss: pip install faiss-cpu")
