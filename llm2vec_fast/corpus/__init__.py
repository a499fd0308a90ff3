"""Embedding whole corpora: inputs of many kinds to shards of vectors, resumable; and search."""

from llm2vec_fast.corpus.run import embed
from llm2vec_fast.corpus.search import search
from llm2vec_fast.corpus.verify import verify

__all__ = ["embed", "search", "verify"]
