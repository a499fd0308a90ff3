"""Small files are looked at before they are opened."""

from __future__ import annotations

import os

import pytest

from llm2vec_fast.model import small_file
from llm2vec_fast.model.small_file import plain_file, read_json


def test_json_and_its_options(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": "字"}', encoding="utf-8")
    assert plain_file(path) is path
    assert read_json(path) == {"a": "字"}
    assert read_json(path, object_pairs_hook=list) == [("a", "字")]


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
    with pytest.raises(OSError, match="not a plain file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is not a plain file"):
        read_json(tmp_path / "pipe")
    monkeypatch.setattr(small_file, "LIMIT", 10)
    (tmp_path / "large").write_text(" " * 11)
    with pytest.raises(ValueError, match="large has 11 bytes"):
        read_json(tmp_path / "large")
