"""llm2vec_fast: decoder-only LLMs as text encoders (LLM2Vec, arXiv 2404.05961), packed and fast.

>>> from llm2vec_fast import LLM2Vec
>>> model = LLM2Vec.from_pretrained("path/or/hub-name")
>>> vectors = model.encode(["a text", "another one"])      # (2, D) float32
"""

from typing import TYPE_CHECKING

from llm2vec_fast.version import __version__

if TYPE_CHECKING:
    from llm2vec_fast.encoder import LLM2Vec

__all__ = ["LLM2Vec", "__version__"]


def __getattr__(name: str):
    # Loaded at first use: `llm2vec-fast --help` need not wait seconds for torch.
    if name == "LLM2Vec":
        from llm2vec_fast.encoder import LLM2Vec

        return LLM2Vec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
