"""The texts that the shipped adapters are trained on: what must be kept out of them is."""

from __future__ import annotations

import json

import pytest

from benchmarks import recipe
from llm2vec_fast.demo import DOCUMENTS, sample


@pytest.fixture(scope="module")
def documents():
    return sample()  # parses the standard library: seconds


def test_a_name_in_words():
    names = {
        "zipfile.ZipFile.read_all": "zipfile zip file read all",
        "http.server.HTTPServer": "http server",  # a word once
        "base64.b64decode": "base 64 b decode",
    }
    assert {name: recipe.words_of(name) for name in names} == names


def test_the_demo_shows_public_names_from_everywhere(documents):
    assert len(documents) == DOCUMENTS == len({name for name, _ in documents})
    assert not [name for name, _ in documents if "._" in f".{name}"]
    assert {name.split(".")[0] for name, _ in documents} >= {"datetime", "subprocess", "zipfile"}


def test_no_pair_is_made_of_a_document_of_the_demo(documents):
    kept_out = {text for _, text in documents}
    positives = [row["positive"] for row in recipe.docstring_pairs()]
    assert len(positives) > 2000 and kept_out.isdisjoint(positives)


def test_documents_like_one_of_the_pairs_are_not_asked_for(tmp_path, monkeypatch):
    """Nor does a word of them stand in the figures."""
    shown = [("a.One", "First line.\n\nThe rest."), ("b.two_three", "Alone.\n\nBy itself.")]
    others = [("c.x", "Something else.\n\nThe rest."), ("d.y", "More.")]
    monkeypatch.setattr(recipe, "sample", lambda: shown)
    monkeypatch.setattr(recipe, "docstrings", lambda: [*shown, *others])
    recipe.make_collection(tmp_path)
    read = [(tmp_path / f"{n}.jsonl").read_text().splitlines() for n in ("corpus", "queries")]
    assert [json.loads(line)["text"] for line in read[0]] == [text for _, text in shown]
    assert [json.loads(line) for line in read[1]] == [{"_id": "q1", "text": "b two three"}]
    assert (tmp_path / "qrels/test.tsv").read_text().splitlines()[1:] == ["q1\td1\t1"]
