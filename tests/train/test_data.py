"""Texts from files and data sets, sequences for MNTP against transformers, and keys of texts."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2vec_fast.text import Template, TextTokenizer
from llm2vec_fast.train import data
from llm2vec_fast.train.data import Chunks, load_dataset_texts, read_texts, text_keys

TEXTS = [
    "The ferry left before sunrise.",
    "a",
    " = A heading = ",
    "naïve 日本語 \u202e",
    "nul\0 and <s> in a text",
    "Return a copy of the string with the first character capitalised and the rest lowered. " * 5,
]


@pytest.fixture
def tokenizer(tiny_tokenizer_dir):
    return TextTokenizer(tiny_tokenizer_dir)


@pytest.fixture
def both_ends(tiny_tokenizer_dir, tmp_path):
    """A directory whose tokenizer puts <s> before and </s> behind."""
    directory = shutil.copytree(tiny_tokenizer_dir, tmp_path / "both")
    told = json.loads((directory / "tokenizer.json").read_text())
    single = told["post_processor"]["single"]
    single.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    told["post_processor"]["special_tokens"]["</s>"] = {
        "id": "</s>",
        "ids": [1],
        "tokens": ["</s>"],
    }
    (directory / "tokenizer.json").write_text(json.dumps(told))
    return directory


def grouped(directory, texts, length):
    """The oracle: transformers' tokenizer, everything concatenated, cut, the rest dropped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    # A special token's name in a text is text to us; transformers can be asked for the same.
    told = tokenizer(texts, return_special_tokens_mask=True, split_special_tokens=True)
    whole = [list(chain(*told[key])) for key in ("input_ids", "special_tokens_mask")]
    until = len(whole[0]) // length * length
    return [[one[i : i + length] for i in range(0, until, length)] for one in whole]


def listed(arrays):
    return [array.tolist() for array in arrays]


@pytest.mark.parametrize("length", [2, 7, 64])
@pytest.mark.parametrize("ends", ["start", "both"])
def test_chunks_are_those_of_transformers(length, ends, tiny_tokenizer_dir, both_ends, monkeypatch):
    directory = both_ends if ends == "both" else tiny_tokenizer_dir
    monkeypatch.setattr(data, "WINDOW", 50)  # several windows
    if length <= 2 and ends == "both":
        with pytest.raises(ValueError, match="leaves nothing to predict beside 2 special tokens"):
            Chunks.from_texts(TEXTS, TextTokenizer(directory), length)
        return
    chunks = Chunks.from_texts(iter(TEXTS), TextTokenizer(directory), length)
    ids, special = chunks.rows(range(len(chunks)))
    expected_ids, expected_special = grouped(directory, TEXTS, length)
    assert listed(ids) == expected_ids
    assert [[int(x) for x in row] for row in special] == expected_special
    assert all(row.dtype == np.int32 for row in ids) and all(row.dtype == bool for row in special)
    assert chunks.n_tokens == len(chunks) * length


def test_rows_in_any_order_and_read_only(tokenizer):
    chunks = Chunks.from_texts(TEXTS, tokenizer, 16)
    ids, special = chunks.rows(np.array([3, 0]))
    assert listed(ids) == [chunks.ids[48:64].tolist(), chunks.ids[:16].tolist()]
    assert special[1].tolist() == [True] + [False] * 15
    with pytest.raises(ValueError, match="read-only"):
        ids[0][0] = 5


def test_line_by_line_is_the_truncation_of_transformers(both_ends):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(both_ends)
    texts = ["", *TEXTS, ""]
    chunks = Chunks.from_texts(texts, TextTokenizer(both_ends), 12, line_by_line=True)
    told = tokenizer(
        TEXTS,
        truncation=True,
        max_length=12,
        return_special_tokens_mask=True,
        split_special_tokens=True,
    )
    ids, special = chunks.rows(range(len(chunks)))
    assert listed(ids) == told["input_ids"]
    assert [[int(x) for x in row] for row in special] == told["special_tokens_mask"]
    assert chunks.left_out == 2 and max(map(len, ids)) == 12 and min(map(len, ids)) == 3
    assert chunks.n_tokens == sum(map(len, ids))


def test_texts_of_one_token_have_nothing_to_predict(tokenizer, monkeypatch):
    """Position 0 predicts nothing: with <s> in front one token is enough, without it two are."""
    texts = ["a", "b", "ab cd", ""]
    assert len(Chunks.from_texts(texts, tokenizer, 8, line_by_line=True)) == 3
    tokenizer.start_ids = []
    chunks = Chunks.from_texts(texts, tokenizer, 8, line_by_line=True)
    assert len(chunks) == 1 and chunks.left_out == 3 and not chunks.special.any()
    with pytest.raises(ValueError, match="none of 3 texts has a token that can be predicted"):
        Chunks.from_texts(["a", "b", ""], tokenizer, 8, line_by_line=True)


def test_fewer_tokens_than_a_chunk(tokenizer):
    n = len(tokenizer.ids_of("ab")) + len(tokenizer.ids_of("c")) + 2
    with pytest.raises(ValueError, match=rf"2 texts have {n} tokens.*to at most {n}, or"):
        Chunks.from_texts(["ab", "c"], tokenizer, 100)
    assert len(Chunks.from_texts(["ab", "c"], tokenizer, n)) == 1
    with pytest.raises(ValueError, match="0 texts have 0 tokens"):
        Chunks.from_texts([], tokenizer, 4)
    with pytest.raises(ValueError, match="leaves nothing to predict"):
        Chunks.from_texts(TEXTS, tokenizer, 1)


def test_the_shorter_last_chunk_is_counted(tokenizer):
    whole = Chunks.from_texts(["ab cd", "ef"], tokenizer, 2, line_by_line=False)
    total = whole.n_tokens + whole.left_out
    assert Chunks.from_texts(["ab cd", "ef"], tokenizer, total - 1).left_out == 1


def test_a_template_is_refused(tiny_tokenizer_dir):
    tokenizer = TextTokenizer(tiny_tokenizer_dir, template=Template.parse("<s>{text}"))
    with pytest.raises(ValueError, match="no template"):
        Chunks.from_texts(TEXTS, tokenizer, 8)


def test_lone_surrogates_are_replaced(tokenizer):
    told = Chunks.from_texts(["a\ud800b"], tokenizer, 3, line_by_line=True)
    assert told.ids.tolist() == Chunks.from_texts(["a\ufffdb"], tokenizer, 3, True).ids.tolist()


def test_fingerprint(tokenizer):
    def of(texts, length, **options):
        return Chunks.from_texts(texts, tokenizer, length, **options).fingerprint()

    assert of(TEXTS, 8) == of(list(TEXTS), 8)
    others = [of(TEXTS, 8), of(TEXTS[1:], 8), of(TEXTS, 9), of(TEXTS, 8, line_by_line=True)]
    assert len(set(others)) == 4 and all(len(one) == 64 for one in others)
    # the same tokens cut otherwise, and others cut the same way
    whole, halves = (Chunks.from_texts(["12345"], tokenizer, length) for length in (6, 3))
    assert whole.ids.tolist() == halves.ids.tolist() and len(halves) == 2 * len(whole) == 2
    assert whole.fingerprint() != halves.fingerprint() != of(["12346"], 3)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=20), length=st.integers(2, 9))
def test_nothing_is_lost_but_the_rest(tiny_tokenizer_dir, texts, length):
    tokenizer = _cached(tiny_tokenizer_dir)
    whole = [i for text in texts for i in [0, *tokenizer.ids_of(data.clean(text))]]
    if len(whole) < length:
        with pytest.raises(ValueError, match="fewer than one chunk"):
            Chunks.from_texts(texts, tokenizer, length)
        return
    chunks = Chunks.from_texts(texts, tokenizer, length)
    assert chunks.ids.tolist() == whole[: len(whole) // length * length]
    assert chunks.left_out == len(whole) % length


_tokenizers: dict = {}


def _cached(directory):
    if directory not in _tokenizers:
        _tokenizers[directory] = TextTokenizer(directory)
    return _tokenizers[directory]


# Reading


def written(path, rows):
    name = path.name
    if name.endswith(".txt"):
        path.write_text("".join(f"{row}\n" for row in rows))
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(
            gzip.compress("".join(json.dumps({"text": r}) + "\n" for r in rows).encode())
        )
    elif name.endswith(".csv"):
        path.write_text("text,n\n" + "".join(f'"{row}",1\n' for row in rows))
    else:
        pq.write_table(pa.table({"text": rows}), path)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_empty_texts_are_left_out_and_counted(tmp_path, name):
    path = written(tmp_path / name, ["one", "", " two ", "  \t", "three"])
    texts = read_texts(path)
    assert texts == ["one", " two ", "three"] and texts.n_empty == 2
    assert read_texts(str(path), limit=2) == ["one", " two "]
    assert read_texts(path, limit=100) == texts


def test_several_files_directories_and_globs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TAKE", 2)
    first = written(tmp_path / "a.txt", ["1", "2", "3", "4"])
    second = written(tmp_path / "b.csv", ["5", "6", "7"])
    assert read_texts([second, first]) == ["5", "6", "7", "1", "2", "3", "4"]
    assert read_texts(tmp_path) == read_texts(str(tmp_path / "*")) == list("1234567")
    assert read_texts(tmp_path, limit=5) == list("12345")


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n')
    assert read_texts(tmp_path / "a.jsonl", text_column="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no texts in .*a.txt"),
        ("a.txt", b"\n \n\n", "no texts in .*a.txt: 3 empty rows"),
        ("a.txt", b"good\n\xff\xfe\n", "a.txt:1: not valid UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "a.jsonl:1: field 'text' is 5, not text"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"texts": "y"}\n',
            "a.jsonl:1: no field 'text'; it has 'texts'",
        ),
        ("a.jsonl", b'{"text": null}\n', "is null"),
        ("a.csv", b"txt\nx\n", "no column 'text'"),
        ("a.parquet", b"nothing", "cannot be read"),
        ("a.exe", b"MZ", "are read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        read_texts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_texts(written(tmp_path / "a.txt", ["x"]), limit=0)


class FakeDataset:
    """What load_dataset_texts asks of a data set."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def select_columns(self, names):
        return FakeDataset(**{name: self.columns[name] for name in names})

    def iter(self, size):
        (values,) = self.columns.values()
        for at in range(0, len(values), size):
            yield {self.column_names[0]: values[at : at + size]}


@pytest.fixture
def fake_datasets(monkeypatch):
    calls = []

    def put(**columns):
        def load_dataset(name, config_name, split):
            calls.append((name, config_name, split))
            return FakeDataset(**columns)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return put


def test_a_data_set(fake_datasets, monkeypatch):
    monkeypatch.setattr(data, "TAKE", 2)
    calls = fake_datasets(text=["one", "", "two", None, "three"], label=[0] * 5)
    texts = load_dataset_texts("wikitext", "wikitext-2-raw-v1")
    assert texts == ["one", "two", "three"] and texts.n_empty == 2
    assert load_dataset_texts("wikitext", None, "validation", limit=1) == ["one"]
    assert calls == [("wikitext", "wikitext-2-raw-v1", "train"), ("wikitext", None, "validation")]


def test_refusals_of_data_sets(fake_datasets, monkeypatch):
    fake_datasets(sentence=["a"], n=[1])
    with pytest.raises(ValueError, match=r"no column 'sentences'.*Did you mean 'sentence'"):
        load_dataset_texts("x", None, text_column="sentences")
    fake_datasets(text=["a", "", 5])
    with pytest.raises(ValueError, match=r"data set 'x', row 2: 5 is not text"):
        load_dataset_texts("x", None)
    fake_datasets(text=["", " "])
    with pytest.raises(ValueError, match="no texts in data set 'x', split 'train': 2"):
        load_dataset_texts("x", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_dataset_texts("x", None)


def test_the_real_datasets_package(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.csv").write_text("text,n\none,1\n,2\ntwo,3\n")
    written(tmp_path / "test.csv", ["three"])
    assert load_dataset_texts(str(tmp_path), None) == ["one", "two"]
    assert load_dataset_texts(str(tmp_path), None, split="test", limit=1) == ["three"]


# Keys


def test_keys_are_equal_for_equal_texts_alone():
    texts = ["a", "b", "a ", "", "a", "\0", "\ud800", "\ufffd", "?", "é"]
    keys = text_keys(texts)
    assert keys.dtype == np.int64 and keys.shape == (10,)
    assert keys[0] == keys[4] and len(set(keys.tolist())) == 9
    assert text_keys(iter([])).shape == (0,)
    many = text_keys(str(n) for n in range(20000))
    assert len(np.unique(many)) == 20000


def test_keys_are_the_same_in_every_process():
    """Ranks compare them; Python's own hash differs from process to process."""
    code = "from llm2vec_fast.train.data import text_keys; print(text_keys(['a', 'b']).tolist())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == str(text_keys(["a", "b"]).tolist())


def test_what_lies_behind_the_limit_is_not_looked_at(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    assert read_texts(tmp_path / "a.jsonl", limit=1) == ["good"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1"):
        read_texts(tmp_path / "a.jsonl")
