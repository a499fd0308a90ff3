"""MtebEncoder: mteb's own conformance run, instructions, identity; `eval mteb` on local data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from llm2vec_fast import LLM2Vec

pytest.importorskip("mteb")

import mteb
from mteb.types import PromptType

from llm2vec_fast.integrations.mteb import (
    MtebEncoder,
    find_task,
    read_instructions,
    retrieval_task,
    scores,
)

COLLECTION = SimpleNamespace(
    documents={"a": "a list of things", "b": "a dict", "c": "numbers are here"},
    queries={"p": "a dict", "q": "numbers are here"},
    relevant={"p": {"b": 1}, "q": {"a": 1}},
)


def test_mock_run_is_clean(encoder):
    found = mteb.mock_run(MtebEncoder(encoder))
    ran = {name: status for name, status in found.items() if status is not None}
    failed = {name: s.exception for name, s in ran.items() if hasattr(s, "exception")}
    assert not failed and len(ran) >= 28


def told(name: str, kind: str, prompt=None) -> SimpleNamespace:
    return SimpleNamespace(name=name, type=kind, prompt=prompt)


def test_instructions(encoder):
    plain = MtebEncoder(encoder)
    query, document = PromptType.query, PromptType.document
    own = told("NFCorpus", "Retrieval", {"query": "Given a question, retrieve documents."})
    assert plain.get_instruction(own, query) == "Given a question, retrieve documents:"
    assert plain.get_instruction(own, document) == ""
    other = told("Other", "Retrieval")
    assert plain.get_instruction(other, query).startswith("Given a web search query, retrieve")
    assert plain.get_instruction(other, document) == ""
    assert plain.get_instruction(told("S", "STS")) == "Retrieve semantically similar text:"
    assert plain.get_instruction(told("C", "Clustering", "Identify it")) == "Identify it:"
    assert plain.get_instruction(told("R", "Regression")) == ""
    given = MtebEncoder(encoder, {"Retrieval": "Search:", "NFCorpus": "Find it", "STS": ""})
    assert given.get_instruction(own, query) == "Find it:"
    assert given.get_instruction(other, query) == "Search:"
    assert given.get_instruction(told("S", "STS", "Own")) == ""


def test_instructions_of_sentence_transformers_layout(encoder):
    for prompt, expected in (("x\nQuery:", "Query:"), ("x\nQuery: ", "Query: ")):
        encoder.settings |= {"verbatim_instruction": True, "prompts": {"q": prompt, "d": ""}}
        model = MtebEncoder(encoder, {"A": "Find", "B": "Task: whole\nQuestion:"})
        assert model.get_instruction(told("A", "STS")) == f"Instruct: Find\n{expected}"
        assert model.get_instruction(told("B", "STS")) == "Task: whole\nQuestion:"


def test_vectors(encoder):
    batches = [{"text": ["a", "b"]}, {"text": ["c"]}]
    where = {"task_metadata": told("S", "STS"), "hf_split": "test", "hf_subset": "default"}
    got = MtebEncoder(encoder).encode(batches, batch_size=1, **where)
    expected = encoder.encode(["a", "b", "c"], instruction="Retrieve semantically similar text:")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="float32"):
        MtebEncoder(encoder).encode(batches, precision="int8", **where)


def test_a_model_is_known_by_what_decides_its_vectors(encoder, directory):
    meta = MtebEncoder(encoder).mteb_model_meta
    assert meta.name == f"local/{directory.name}" and meta.embed_dim == encoder.dimension
    assert MtebEncoder(encoder).mteb_model_meta.revision == meta.revision
    assert MtebEncoder(encoder, {"STS": "x"}).mteb_model_meta.revision != meta.revision
    causal = LLM2Vec.from_pretrained(directory, dtype="float32", enable_bidirectional=False)
    assert MtebEncoder(causal).mteb_model_meta.revision != meta.revision
    assert MtebEncoder(encoder, name="me/mine").mteb_model_meta.name == "me/mine"


def test_a_task_of_local_data(encoder, tmp_path, monkeypatch):
    task = retrieval_task("Mine", COLLECTION, "Find it")
    found = scores(encoder, [task], results=tmp_path)
    queries = encoder.encode(list(COLLECTION.queries.values()), instruction="Find it:")
    documents = encoder.encode(list(COLLECTION.documents.values()))
    queries, documents = (x / x.norm(dim=1, keepdim=True) for x in (queries, documents))
    order = (queries @ documents.T).argsort(dim=1, descending=True).tolist()
    ranks = [order[0].index(1), order[1].index(0)]
    assert found == {"Mine": pytest.approx(np.mean([100 / np.log2(r + 2) for r in ranks]), abs=0.1)}
    monkeypatch.setattr(MtebEncoder, "encode", None)  # the files in `results` answer
    assert scores(encoder, [task], results=tmp_path) == found


def test_what_a_user_may_get_wrong(tmp_path):
    with pytest.raises(ValueError, match="Did you mean: 'NFCorpus'"):
        find_task("NFCorpu")
    file = tmp_path / "instructions.json"
    for text in ("{", "[]", '{"STS": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"instructions\.json"):
            read_instructions(file)


def test_the_command(directory, tmp_path, capsys):
    from llm2vec_fast.cli import app

    beir = tmp_path / "things"
    (beir / "qrels").mkdir(parents=True)
    for name in ("documents", "queries"):
        rows = getattr(COLLECTION, name).items()
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in rows]
        file = "corpus" if name == "documents" else name
        (beir / f"{file}.jsonl").write_text("".join(lines))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\np\tb\t1\nq\ta\t1\n")
    instructions = tmp_path / "instructions.json"
    instructions.write_text('{"things": "Find the thing"}')
    output = tmp_path / "figures.json"
    words = ["eval", "mteb", str(beir), "--model", f"base={directory},dtype=float32"]
    words += ["--model", f"base={directory},dtype=float32,causal=true"]
    words += ["--instructions", str(instructions), "--output", str(output), "--device", "cpu"]
    app([*words, "--results", str(tmp_path / "results")], standalone_mode=False)
    assert "mteb: things" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert len(written["rows"]) == 2 and written["data"]["instructions"]["things"]
    assert 0 < written["rows"][0]["figures"]["things"] <= 100
    assert list((tmp_path / "results").rglob("things.json"))
