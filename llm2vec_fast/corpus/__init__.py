"""Embedding whole corpora: files of texts to Parquet shards of vectors, resumable; and search."""

from llm2vec_fast.corpus.run import embed
from llm2vec_fast.corpus.search import search

__all__ = ["embed", "search"]
