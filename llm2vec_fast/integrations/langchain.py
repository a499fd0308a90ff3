"""LLM2Vec as LangChain's `Embeddings`, for its vector stores and retrievers.

>>> embeddings = LLM2VecEmbeddings(LLM2Vec.from_pretrained("path/or/hub-name"))
>>> store = InMemoryVectorStore(embeddings)
"""

from __future__ import annotations

from threading import Lock

from langchain_core.embeddings import Embeddings

from llm2vec_fast.encoder import LLM2Vec


class LLM2VecEmbeddings(Embeddings):
    """Vectors as lists of floats. Any number of texts is one call: the model packs them itself.

    model:                the encoder; it is not copied
    query_instruction:    put before every query and, by the model's skip_instruction, not pooled
    document_instruction: the same for documents; models of LLM2Vec are trained without
    normalize:            to length one, so that stores that compare by dot product, cosine or
                          Euclidean distance rank alike
    """

    def __init__(
        self,
        model: LLM2Vec,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        normalize: bool = True,
    ):
        self.model, self.normalize = model, normalize
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction
        self._one_at_a_time = Lock()  # the async methods call from many threads

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector for each text. Raises ValueError naming the row that is not text."""
        return self._encode(texts, self.document_instruction)

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return self._encode([text], self.query_instruction)[0]

    def _encode(self, texts: list[str], instruction: str | None) -> list[list[float]]:
        with self._one_at_a_time:
            vectors = self.model.encode(
                texts, instruction=instruction, normalize=self.normalize, show_progress_bar=False
            )
        return vectors.tolist()
