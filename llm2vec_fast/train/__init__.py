"""Training: MNTP, SimCSE, supervised."""

from llm2vec_fast.train.config import Config, as_json, load
from llm2vec_fast.train.run import how_to_load, train

__all__ = ["Config", "as_json", "how_to_load", "load", "train"]
