"""Search is exact, whatever the precision, and refuses a model that has changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search
from llm2vec_fast.corpus.plan import ManifestError

TEXTS = [
    "list of numbers", "", "dict of keys and values", "an empty set", "bytes and integers",
    "sequence of objects", "returns a new list", "key error",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("search"), "llama"))


def make(directory, tmp_path, **options):
    source = tmp_path / "t.jsonl"
    records = [{"text": text, "n": str(n)} for n, text in enumerate(TEXTS)]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out"
    embed(source, directory, out, id_column="n", keep=["text"], rows_per_shard=3, **options)
    return out


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_equals_brute_force(directory, tmp_path, precision, k):
    out = make(directory, tmp_path, precision=precision)
    model = LLM2Vec.from_pretrained(directory)
    queries = ["a list", "the keys of a dict"]
    answers = search(out, queries, k=k)
    docs, asked = (model.encode(t, normalize=True, convert_to_numpy=True) for t in (TEXTS, queries))
    for scores, hits in zip(asked @ docs.T, answers, strict=True):
        scores[1] = -np.inf  # the empty text has no direction: it is never an answer
        order = np.argsort(-scores)[: min(k, len(TEXTS) - 1)]
        tolerance = 1e-5 if precision == "float32" else 2e-2
        np.testing.assert_allclose([h.score for h in hits], scores[order], atol=tolerance)
        if precision == "float32":
            assert [hit.id for hit in hits] == [str(n) for n in order]
        assert all(hit.kept["text"] == TEXTS[int(hit.id)] for hit in hits)


def test_binary_finds_the_document_itself(directory, tmp_path):
    out = make(directory, tmp_path, precision="binary")
    assert search(out, "dict of keys and values", k=1)[0][0].id == "2"


def test_the_instruction_is_the_query_s_own(directory, tmp_path):
    out = make(directory, tmp_path, precision="float32")
    model = LLM2Vec.from_pretrained(directory)
    plain = search(out, "a list", k=1, model=model)[0][0].score
    asked = search(out, "a list", k=1, model=model, instruction="find the type")[0][0].score
    assert plain != asked


def test_refusals(directory, tmp_path, tiny_model, add_tokenizer):
    out = make(directory, tmp_path)
    other = LLM2Vec.from_pretrained(add_tokenizer(tiny_model(tmp_path, "llama", seed=5)))
    with pytest.raises(ManifestError, match="fingerprint"):
        search(out, "a", model=other)
    causal = LLM2Vec.from_pretrained(directory, enable_bidirectional=False)
    with pytest.raises(ManifestError, match="settings"):
        search(out, "a", model=causal)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        search(tmp_path, "a")
    with pytest.raises(ValueError, match="k must"):
        search(out, "a", k=0)
