"""llm2vec_fast: decoder-only LLMs as text encoders (LLM2Vec, arXiv 2404.05961), packed and fast.

>>> from llm2vec_fast import LLM2Vec
>>> model = LLM2Vec.from_pretrained("path/or/hub-name")
>>> vectors = model.encode(["a text", "another one"])      # (2, D) float32
"""

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.version import __version__

__all__ = ["LLM2Vec", "__version__"]
