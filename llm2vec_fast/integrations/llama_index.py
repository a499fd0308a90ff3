"""LLM2Vec as llama-index's embedding model.

>>> Settings.embed_model = LLM2VecEmbedding(LLM2Vec.from_pretrained("path/or/hub-name"))
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from threading import Lock
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr

from llm2vec_fast.encoder import LLM2Vec


class LLM2VecEmbedding(BaseEmbedding):
    """Vectors as lists of floats; the texts of a call are packed together.

    model:   the encoder; it is not copied
    options: the fields below and those of BaseEmbedding; another name is an error
    """

    model_config = ConfigDict(extra="forbid")

    query_instruction: str = Field(default="", description="Put before every query")
    text_instruction: str = Field(default="", description="Put before every document")
    normalize: bool = Field(default=True, description="To length one")
    # An ingestion pipeline's cache goes by the fields: another model must not hit its vectors.
    model_revision: str = Field(description="A hash of all that decides the model's vectors")
    _model: LLM2Vec = PrivateAttr()
    _one_at_a_time: Any = PrivateAttr(default_factory=Lock)

    def __init__(self, model: LLM2Vec, **options: Any):
        told = json.dumps(model.describe(), sort_keys=True)
        own: dict[str, Any] = {
            "model_name": model.sources.name,
            "model_revision": hashlib.sha256(told.encode()).hexdigest()[:40],
            "embed_batch_size": 2048,  # the most that is allowed: the model cuts batches itself
        }
        super().__init__(**own | options)
        self._model = model

    @classmethod
    def class_name(cls) -> str:
        return "LLM2VecEmbedding"

    def _encode(self, texts: list[str], instruction: str) -> list[list[float]]:
        with self._one_at_a_time:  # the async methods call from many threads
            vectors = self._model.encode(
                texts, instruction=instruction, normalize=self.normalize, show_progress_bar=False
            )
        return vectors.tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._encode([query], self.query_instruction)[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._encode([text], self.text_instruction)[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._encode(texts, self.text_instruction)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
