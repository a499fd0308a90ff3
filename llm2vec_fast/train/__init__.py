"""Training: MNTP, SimCSE, supervised."""

from llm2vec_fast.train.config import Config, as_json, load
from llm2vec_fast.train.run import train

__all__ = ["Config", "as_json", "load", "train"]
