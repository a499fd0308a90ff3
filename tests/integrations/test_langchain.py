"""LangChain's own conformance tests, and what they do not ask."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from llm2vec_fast.integrations.langchain import LLM2VecEmbeddings

INSTRUCTION = "Find the sentence that answers:"


class OnATinyModel:
    @pytest.fixture(autouse=True)
    def _tiny(self, encoder):
        self.encoder = encoder

    @property
    def embeddings_class(self):
        return LLM2VecEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        return {"model": self.encoder}


class TestUnit(OnATinyModel, EmbeddingsUnitTests):
    pass


class TestIntegration(OnATinyModel, EmbeddingsIntegrationTests):
    pass


def test_vectors_are_those_of_encode(encoder, texts):
    embeddings = LLM2VecEmbeddings(encoder, INSTRUCTION, normalize=False)
    found = embeddings.embed_documents(texts)
    np.testing.assert_array_equal(np.float32(found), encoder.encode(texts).numpy())
    query = embeddings.embed_query(texts[0])
    expected = encoder.encode([[INSTRUCTION, texts[0]]])[0].numpy()
    np.testing.assert_array_equal(np.float32(query), expected)
    assert np.abs(np.float32(query) - np.float32(found[0])).max() > 1e-3
    of_length_one = LLM2VecEmbeddings(encoder).embed_documents(texts)
    np.testing.assert_allclose(np.linalg.norm(of_length_one, axis=1), 1, atol=1e-5)


def test_a_store_finds_a_text_by_itself(encoder, texts):
    store = InMemoryVectorStore.from_texts(texts, LLM2VecEmbeddings(encoder))
    for text in texts:
        ((found, score),) = store.similarity_search_with_score(text, k=1)
        assert found.page_content == text and score == pytest.approx(1, abs=1e-5)


def test_many_at_once(encoder, texts):
    embeddings = LLM2VecEmbeddings(encoder)

    async def ask():
        return await asyncio.gather(*[embeddings.aembed_query(text) for text in texts * 4])

    alone = [embeddings.embed_query(text) for text in texts] * 4
    assert asyncio.run(ask()) == alone


def test_nothing_and_bad_input(encoder):
    embeddings = LLM2VecEmbeddings(encoder)
    assert embeddings.embed_documents([]) == []
    assert not any(embeddings.embed_query(""))
    with pytest.raises(ValueError, match="row 1 is not a text"):
        embeddings.embed_documents(["a", None])
