"""sentence-transformers' files beside a model, as its versions 2 to 6 write them."""

from __future__ import annotations

import json

import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.model.sentence_layout import read_layout
from llm2vec_fast.settings import OWN_FILE, own_settings

CONFIG = {"max_position_embeddings": 512}
OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."


def write(path, told) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(told if isinstance(told, str) else json.dumps(told))


def layout(directory, *types: str, pooling=None, config=CONFIG) -> dict:
    """What is read of a directory with these modules and this 1_Pooling/config.json."""
    paths = ["" if n == 0 else f"{n}_{kind.rsplit('.', 1)[1]}" for n, kind in enumerate(types)]
    rows = [{"type": kind, "path": path} for kind, path in zip(types, paths, strict=True)]
    write(directory / "modules.json", rows)
    if pooling is not None:
        write(directory / "1_Pooling" / "config.json", pooling)
    return read_layout(directory, config)


def test_nothing_is_said_where_there_is_nothing(tmp_path):
    assert read_layout(tmp_path, CONFIG) == {}
    assert layout(tmp_path, "llm2vec_fast.integrations.sentence_transformers.LLM2VecModule") == {}


def test_an_old_layout(tmp_path):
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 4096, "do_lower_case": False})
    write(tmp_path / "config_sentence_transformers.json", {"prompts": {"q": "Query: ", "n": None}})
    flags = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": False}
    found = layout(
        tmp_path, OLD + "Transformer", OLD + "Pooling", OLD + "Normalize",
        pooling=flags | {"pooling_mode_lasttoken": True},
    )  # fmt: skip
    assert found == {
        "pooling_mode": "last_token",
        "skip_instruction": False,
        "max_length": 4096,
        "doc_max_length": 4096,
        "bidirectional": False,
        "template": "none",
        "prompts": {"q": "Query: "},
    }


def test_a_new_layout(tmp_path):
    write(tmp_path / "tokenizer_config.json", {"model_max_length": 100})
    found = layout(
        tmp_path, "sentence_transformers.base.modules.transformer.Transformer", NEW + "Pooling",
        pooling={"pooling_mode": "mean", "include_prompt": False},
        config=CONFIG | {"is_causal": False},
    )  # fmt: skip
    assert (found["pooling_mode"], found["skip_instruction"]) == ("mean", True)
    assert found["max_length"] == 100 and found["bidirectional"] and found["prompts"] == {}


@pytest.mark.parametrize(
    ("told", "expected"), [({"model_max_length": 1e30}, 512), ({"model_max_length": 64}, 64)]
)
def test_length_by_tokenizer_and_positions(tmp_path, told, expected):
    write(tmp_path / "tokenizer_config.json", told)
    assert layout(tmp_path, OLD + "Transformer")["max_length"] == expected


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "lasttoken"]},
        {"pooling_mode": "weightedmean", "include_prompt": False},
    ],
)
def test_poolings_that_this_engine_lacks_are_named(tmp_path, pooling):
    mode = layout(tmp_path, OLD + "Transformer", OLD + "Pooling", pooling=pooling)["pooling_mode"]
    assert "1_Pooling" in mode and str(pooling["pooling_mode"][0]) in mode


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"modules\.json has the module 'Dense'"):
        layout(tmp_path, OLD + "Transformer", OLD + "Pooling", OLD + "Dense", pooling={})
    for text in ("{", "{}", "[1]"):
        write(tmp_path / "modules.json", text)
        with pytest.raises(ValueError, match=r"modules\.json"):
            read_layout(tmp_path, CONFIG)


def test_a_model_of_this_layout(tiny_model, add_tokenizer, tmp_path):
    base = add_tokenizer(tiny_model(tmp_path, "qwen3"))
    prompts = {"query": "Find:"}
    write(base / "config_sentence_transformers.json", {"prompts": prompts})
    layout(base, OLD + "Transformer", OLD + "Pooling", pooling={"pooling_mode_lasttoken": True})
    model = LLM2Vec.from_pretrained(base, dtype="float32", device="cpu")
    assert model.model.causal and model.settings["pooling_mode"] == "last_token"
    assert model.settings["max_length"] == model.settings["doc_max_length"] == 512
    assert model.settings["prompts"] == prompts
    ids = model.tokenizer(["a cat"], ["Find:"])[0].ids.tolist()
    assert ids == model.tokenizer.raw.encode("Find:a cat").ids  # no space between
    (base / OWN_FILE).write_text(json.dumps(own_settings(model.settings)))
    (base / "modules.json").unlink()  # what was saved says the same
    again = LLM2Vec.from_pretrained(base, dtype="float32", device="cpu", pooling_mode="last_token")
    assert again.model.causal and again.settings["prompts"] == prompts
    assert again.tokenizer(["a cat"], ["Find:"])[0].ids.tolist() == ids
