"""The transformer: its config, its forward pass, its weights and adapters."""

from llm2vec_fast.model.config import ConfigError, ModelConfig
from llm2vec_fast.model.transformer import Transformer

__all__ = ["ConfigError", "ModelConfig", "Transformer"]
