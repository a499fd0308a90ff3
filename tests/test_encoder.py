"""LLM2Vec: what a user calls, on tiny random models (the real one is in test_smollm2.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2vec_fast import LLM2Vec
from llm2vec_fast.settings import choose_device, choose_dtype

TEXTS = [
    "a cat",
    "The quick brown fox jumps over the lazy dog.",
    "dict() -> new empty dictionary\ndict(mapping) -> new dictionary",
    "x",
    "list of numbers, list of words and a set of both of them " * 3,
]


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("encoder"), "llama"))


@pytest.fixture(scope="module")
def model(directory):
    return LLM2Vec.from_pretrained(directory, dtype="float32", device="cpu")


def test_shapes_and_types(model):
    one, several = model.encode("a cat"), model.encode(TEXTS)
    assert one.shape == (48,) and several.shape == (5, 48)
    assert several.dtype == torch.float32 and several.device.type == "cpu"
    torch.testing.assert_close(several[0], one, rtol=0, atol=1e-5)
    assert model.encode([]).shape == (0, 48) and model.encode([]).dtype == torch.float32
    assert isinstance(model.encode(TEXTS, convert_to_numpy=True), np.ndarray)
    both = model.encode(TEXTS, convert_to_numpy=True, convert_to_tensor=True)
    assert isinstance(both, torch.Tensor)


def test_an_empty_text_is_the_zero_vector_and_disturbs_nobody(model):
    vectors = model.encode(["", "a cat", "  \n\t"])
    assert not vectors[0].any() and not vectors[2].any()
    torch.testing.assert_close(vectors[1], model.encode("a cat"), rtol=0, atol=1e-5)
    assert not model.encode("").any()
    assert not model.encode([["an instruction", ""]]).any()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.permutations(range(len(TEXTS))),
    tokens_per_batch=st.integers(1, 400),
    batch_size=st.one_of(st.none(), st.integers(1, 6)),
)
def test_vectors_do_not_depend_on_batch_order_or_budget(model, order, tokens_per_batch, batch_size):
    expected = model.encode(TEXTS)
    texts = [TEXTS[i] for i in order]
    got = model.encode(texts, batch_size, tokens_per_batch=tokens_per_batch)
    torch.testing.assert_close(got, expected[list(order)], rtol=0, atol=1e-5)


def test_instructions_are_read_but_not_pooled(model, directory):
    pairs = model.encode([["find the animal", text] for text in TEXTS])
    keyword = model.encode(TEXTS, instruction="find the animal")
    torch.testing.assert_close(pairs, keyword)
    assert (pairs - model.encode(TEXTS)).abs().max() > 1e-3  # it was read
    tokens = model.tokenizer(["a cat"], ["find the animal"])[0]
    assert tokens.start > 1  # and it is outside of the span
    whole = LLM2Vec.from_pretrained(directory, dtype="float32", skip_instruction=False)
    assert whole.tokenizer(["a cat"], ["find the animal"])[0].start == 0


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"])
@pytest.mark.parametrize("skip", [True, False])
def test_pooling_modes(directory, mode, skip):
    """Against the definition, from the hidden states of the sequence."""
    model = LLM2Vec.from_pretrained(
        directory, pooling_mode=mode, skip_instruction=skip, dtype="float32"
    )
    tokens = model.tokenizer(["The quick brown fox"], ["animals"])[0]
    from llm2vec_fast.batch import PackedBatch

    with torch.inference_mode():
        hidden = model.model(PackedBatch.build([tokens.ids])).double()
    offsets = model.tokenizer.raw.encode("animals The quick brown fox").offsets
    prefix = sum(end <= len("animals ") for _, end in offsets)  # <s> ends at 0
    span = hidden[prefix if skip else 0 :]
    weights = torch.arange(1, len(span) + 1).double()
    expected = {
        "mean": span.mean(0),
        "weighted_mean": (weights[:, None] * span).sum(0) / weights.sum(),
        "last_token": span[-1],
        "eos_token": span[-1],
        "bos_token": hidden[0],
    }[mode]
    got = model.encode([["animals", "The quick brown fox"]])[0]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert (tokens.ids[-1] == model.tokenizer.eos_id) == (mode == "eos_token")
    assert tokens.ids[0] == model.tokenizer.bos_id


def test_normalise_truncate_and_quantise_in_that_order(model):
    raw = model.encode(TEXTS, convert_to_numpy=True)
    cut = raw[:, :16] / np.linalg.norm(raw[:, :16], axis=1, keepdims=True)
    got = model.encode(TEXTS, normalize=True, truncate_dim=16, convert_to_numpy=True)
    np.testing.assert_allclose(got, cut, atol=1e-6)
    np.testing.assert_allclose(
        model.encode(TEXTS, precision="float16", convert_to_numpy=True), raw, rtol=1e-3, atol=1e-3
    )
    steps = model.encode(TEXTS, precision="int8", convert_to_numpy=True)
    scale = np.abs(raw).max(axis=1, keepdims=True) / 127
    assert steps.dtype == np.int8
    np.testing.assert_allclose(steps * scale, raw, atol=scale.max() / 2 + 1e-6)
    bits = model.encode(TEXTS, precision="binary", convert_to_numpy=True)
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1, count=48), raw > 0)
    assert model.encode(["", "a"], precision="int8").shape == (2, 48)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (["a", None], "row 1"),
        (["a", float("nan")], "row 1"),
        ([b"bytes"], "row 0"),
        (["a", ["i", 3]], "row 1"),
        ([["i", "t", "x"]], "row 0"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_what_is_not_text_is_named(model, bad, told):
    with pytest.raises(ValueError, match=told):
        model.encode(bad)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"precision": "int4"}, "precision"),
        ({"truncate_dim": 0}, "truncate_dim"),
        ({"truncate_dim": 49}, "1 to 48"),
        ({"batch_size": 0}, "batch_size"),
        ({"tokens_per_batch": -1}, "tokens_per_batch"),
    ],
)
def test_wrong_arguments_of_encode(model, arguments, told):
    with pytest.raises(ValueError, match=told):
        model.encode(["a"], **arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"pooling_mode": "median"}, "pooling_mode"),
        ({"max_length": 0}, "max_length"),
        ({"compat": "old"}, "compat"),
        ({"dtype": "int4"}, "dtype"),
        ({"template": "no place"}, "template"),
        ({"device_map": {"a": "cpu", "b": "cpu"}}, "device_map"),
    ],
)
def test_wrong_arguments_of_from_pretrained(directory, arguments, told):
    with pytest.raises(ValueError, match=told):
        LLM2Vec.from_pretrained(directory, **arguments)
    with pytest.raises(TypeError):
        LLM2Vec.from_pretrained(directory, pooling="mean")  # a typo is not swallowed


def test_saved_settings_and_who_wins(directory, tmp_path, tiny_model, add_tokenizer):
    path = add_tokenizer(tiny_model(tmp_path, "llama"))
    told = {"pooling_mode": "last_token", "max_length": 40, "doc_max_length": 30}
    (path / "llm2vec_config.json").write_text(json.dumps(told))
    model = LLM2Vec.from_pretrained(path)
    assert model.settings["pooling_mode"] == "last_token"
    assert (model.settings["max_length"], model.settings["doc_max_length"]) == (40, 30)
    model = LLM2Vec.from_pretrained(path, pooling_mode="mean", max_length=20)
    assert model.settings["pooling_mode"] == "mean"
    assert (model.settings["max_length"], model.settings["doc_max_length"]) == (20, 20)
    official = LLM2Vec.from_pretrained(path, max_length=50, compat="official")
    assert (official.settings["max_length"], official.settings["doc_max_length"]) == (50, 30)
    (path / "llm2vec_config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"llm2vec_config\.json"):
        LLM2Vec.from_pretrained(path)


def test_official_keyword_names(directory):
    model = LLM2Vec.from_pretrained(
        directory, None, True, True, torch_dtype=torch.float32, device_map="cpu",
        attn_implementation="flash_attention_2",
    )  # fmt: skip
    assert model.dtype == torch.float32 and model.device.type == "cpu"


def test_merged_save_and_load_gives_the_same_vectors(directory, tmp_path):
    model = LLM2Vec.from_pretrained(
        directory, pooling_mode="weighted_mean", max_length=99, template="[INST] {text} [/INST]",
        enable_bidirectional=False, dtype="float32",
    )  # fmt: skip
    model.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", dtype="float32")
    assert again.settings == model.settings
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=0)
    official = json.loads((tmp_path / "saved" / "llm2vec_config.json").read_text())
    assert set(official) == {"pooling_mode", "max_length", "doc_max_length", "skip_instruction"}
    assert not list((tmp_path / "saved").glob("*.partial"))


def test_a_saved_bidirectional_model_is_bidirectional_for_transformers_too(directory, tmp_path):
    """config.json of merged weights makes stock transformers look both ways by itself."""
    from transformers import AutoModel

    model = LLM2Vec.from_pretrained(directory, dtype="float32")
    model.save(tmp_path / "both", merge_before_save=True)
    stock = AutoModel.from_pretrained(tmp_path / "both", dtype=torch.float32).eval()
    tokens = model.tokenizer(["The quick brown fox"], [""])[0]
    with torch.no_grad():
        hidden = stock(torch.from_numpy(tokens.ids.astype(np.int64))[None]).last_hidden_state[0]
    expected = hidden[tokens.start : tokens.end].mean(0)
    torch.testing.assert_close(model.encode("The quick brown fox"), expected, rtol=0, atol=1e-4)


def test_templates_by_name_by_argument_and_saved(tiny_model, add_tokenizer, tmp_path):
    path = add_tokenizer(tiny_model(tmp_path, "mistral"))
    config = json.loads((path / "config.json").read_text())
    config["_name_or_path"] = "mistralai/Mistral-7B-Instruct-v0.2"
    (path / "config.json").write_text(json.dumps(config))
    assert LLM2Vec.from_pretrained(path).settings["template"] == "[INST] {text} [/INST]"
    assert LLM2Vec.from_pretrained(path, template="none").settings["template"] == "none"
    model = LLM2Vec.from_pretrained(path, template="<|im_start|>{text}<|im_end|>", dtype="float32")
    tokens = model.tokenizer(["a cat"], [""])[0]
    special = model.tokenizer.raw.token_to_id
    assert tokens.ids[1] == special("<|im_start|>") and tokens.ids[-1] == special("<|im_end|>")


def test_vectors_that_are_not_finite_are_refused(directory):
    model = LLM2Vec.from_pretrained(directory, dtype="float32")
    with torch.no_grad():
        model.model.layers[1].mlp.down.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        model.encode(["a cat"])


def test_dtype_auto(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("llm2vec_fast.settings._cpu_has_bf16", lambda has=has: has)
        assert choose_dtype("auto", torch.device("cpu")) == dtype
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype(torch.float16, torch.device("cpu")) == torch.float16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            choose_device("cuda", None)


def test_bf16_error_is_at_most_half_as_much_between_batchings(directory):
    """Equivalence check 4 for bf16: 1-cos between batchings against bf16's own 1-cos."""
    exact = LLM2Vec.from_pretrained(directory, enable_bidirectional=False, dtype="float32")
    half = LLM2Vec.from_pretrained(directory, enable_bidirectional=False, dtype="bfloat16")

    def unit(x):
        return x.double() / x.double().norm(dim=1, keepdim=True)

    together, alone = unit(half.encode(TEXTS)), unit(half.encode(TEXTS, batch_size=1))
    truth = unit(exact.encode(TEXTS))
    between = (1 - (together * alone).sum(1)).max()
    own = (1 - (together * truth).sum(1)).max()
    assert own > 0 and between <= own / 2 + 1e-9


def with_room_for(model, monkeypatch, limit: int) -> list[int]:
    """The device has room for `limit` tokens in a batch; returns the batches that are tried."""
    forward, tried = model.model.forward, []

    def limited(batch, *training):
        tried.append(batch.n_tokens)
        if batch.n_tokens > limit:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch, *training)

    monkeypatch.setattr(model.model, "forward", limited)
    return tried


def test_a_batch_that_does_not_fit_is_split_and_tried_again(model, monkeypatch):
    texts = [*TEXTS, "", *TEXTS[::-1]] * 4
    expected = model.encode(texts)
    total = sum(map(len, model.tokenizer(texts, [""] * len(texts))))
    tried = with_room_for(model, monkeypatch, 150)
    got = model.encode(texts, tokens_per_batch=400)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    failed = [n for n in tried if n > 150]
    assert 350 >= failed[0] > 150 and len(failed) <= 2  # and nothing as large again
    assert sum(tried) - sum(failed) == total  # and what was computed stays


def test_a_text_that_does_not_fit_alone_is_named(model, monkeypatch):
    tokens = model.tokenizer(TEXTS, [""] * 5)
    longest = max(range(5), key=lambda row: len(tokens[row]))
    tried = with_room_for(model, monkeypatch, len(tokens[longest]) - 1)
    with pytest.raises(
        ValueError, match=f"text {longest} has {len(tokens[longest])} tokens.*alone"
    ):
        model.encode(TEXTS)
    monkeypatch.setattr("llm2vec_fast.encoder.WINDOW", 2)
    with pytest.raises(ValueError, match=f"text {longest} "):  # counted over all windows
        model.encode(TEXTS)
    tried.clear()
    named, counted = [], []
    result = model.embed_tokens(
        tokens, progress=lambda *batch: counted.append(batch), too_long=named.append
    )
    assert named == [longest]
    vectors = result()
    assert not vectors[longest].any() and np.delete(vectors, longest, 0).any(axis=1).all()
    assert np.sum(counted, axis=0).tolist() == [5, sum(map(len, tokens))]


def test_windows_are_queued_one_ahead(model, monkeypatch):
    """The next window is tokenised before the last one's vectors are waited for."""
    expected, turns = model.encode(TEXTS), []
    embed_tokens, tokenize = model.embed_tokens, model.tokenizer.__call__

    def queue(tokens, *rest):
        turns.append("queue")
        result = embed_tokens(tokens, *rest)
        return lambda: turns.append("wait") or result()

    def tokenizer(texts, instructions):
        turns.append("tokenise")
        return tokenize(texts, instructions)

    monkeypatch.setattr("llm2vec_fast.encoder.WINDOW", 2)
    monkeypatch.setattr(model, "embed_tokens", queue)
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    torch.testing.assert_close(model.encode(TEXTS), expected, rtol=0, atol=1e-5)
    assert turns == ["tokenise", "queue"] * 2 + ["wait", "tokenise", "queue", "wait", "wait"]


def test_the_budget_is_settled_once(directory, monkeypatch):
    model = LLM2Vec.from_pretrained(directory, dtype="float32")
    asked = []
    monkeypatch.setattr(
        "llm2vec_fast.encoder.default_budget", lambda *of: asked.append(of) or 100 + len(asked)
    )
    assert [model.tokens_per_batch for _ in range(3)] == [101] * 3
    model.to(torch.bfloat16)
    assert model.tokens_per_batch == 102
    cpu = torch.device("cpu")
    assert [of[1:] for of in asked] == [(torch.float32, cpu), (torch.bfloat16, cpu)]
