"""llama-index's calls: batches, queries with their instruction, an index, a pipeline's cache."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQuery

from llm2vec_fast import LLM2Vec
from llm2vec_fast.integrations.llama_index import LLM2VecEmbedding

INSTRUCTION = "Find the sentence that answers:"


def test_a_batch_is_one_call_with_the_vectors_of_encode(encoder, texts, monkeypatch):
    expected = encoder.encode(texts).numpy()
    embedding, calls = LLM2VecEmbedding(encoder, normalize=False), []
    encode = LLM2Vec.encode

    def counted(self, sentences, *args, **options):
        calls.append(len(sentences))
        return encode(self, sentences, *args, **options)

    monkeypatch.setattr(LLM2Vec, "encode", counted)
    found = embedding.get_text_embedding_batch(texts)
    again = asyncio.run(embedding.aget_text_embedding_batch(texts))
    assert calls == [len(texts)] * 2
    np.testing.assert_array_equal(np.float32(found), expected)
    assert again == found


def test_queries_have_their_instruction(encoder, texts):
    embedding = LLM2VecEmbedding(encoder, query_instruction=INSTRUCTION)
    query = embedding.get_query_embedding(texts[0])
    expected = encoder.encode([[INSTRUCTION, texts[0]]], normalize=True)[0].numpy()
    np.testing.assert_array_equal(np.float32(query), expected)
    assert asyncio.run(embedding.aget_query_embedding(texts[0])) == query
    text = embedding.get_text_embedding(texts[0])
    assert asyncio.run(embedding.aget_text_embedding(texts[0])) == text
    assert embedding.similarity(query, text) < 0.9999
    own = LLM2VecEmbedding(encoder, text_instruction=INSTRUCTION)
    assert own.get_text_embedding(texts[0]) == query


def test_nodes_are_found_in_a_store(encoder, texts):
    embedding, store = LLM2VecEmbedding(encoder), SimpleVectorStore()
    nodes = IngestionPipeline(transformations=[embedding]).run(
        nodes=[TextNode(id_=str(i), text=text) for i, text in enumerate(texts)]
    )
    store.add(nodes)
    for i, text in enumerate(texts):
        query = VectorStoreQuery(embedding.get_query_embedding(text), similarity_top_k=1)
        assert store.query(query).ids == [str(i)]


def test_a_pipelines_cache_does_not_take_one_model_for_another(directory, encoder):
    other = LLM2Vec.from_pretrained(directory, dtype="float32", pooling_mode="last_token")
    cache, found = IngestionCache(), []
    for model in (encoder, other, encoder):
        pipeline = IngestionPipeline(transformations=[LLM2VecEmbedding(model)], cache=cache)
        (node,) = pipeline.run(nodes=[TextNode(id_="0", text="a cat")])
        found.append(node.embedding)
    assert found[0] == found[2] != found[1]


def test_options_of_the_base_class_and_typos(encoder):
    assert LLM2VecEmbedding(encoder, embed_batch_size=3).embed_batch_size == 3
    with pytest.raises(ValueError, match="query_instrction"):
        LLM2VecEmbedding(encoder, query_instrction="x")
