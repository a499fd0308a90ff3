"""The forward pass against transformers itself: every family, both attention modes, packed."""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.config import Rope
from llm2vec_fast.model.selfcheck import check_attention_mode
from llm2vec_fast.model.transformer import rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-mqa-3-layers": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "causal_lm": True}),
    "llama-head-dim": ("llama", {"head_dim": 20}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 4.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-eps": ("llama", {"rms_norm_eps": 0.3}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
}
LENGTHS = (1, 23, 7, 40)
MODES = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def texts(lengths=LENGTHS, vocab=300, seed=0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocab, (n,), generator=draw).tolist() for n in lengths]


@torch.no_grad()
def packed(model, rows) -> list[torch.Tensor]:
    """Each text's hidden states out of one packed forward pass."""
    batch = PackedBatch.build(rows)
    return list(model(batch).split(batch.lengths))


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference as a part of the largest activation."""
    return ((got.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


@MODES
@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_transformers(tiny_model, stock, ours, name, causal):
    family, overrides = MODELS[name]
    directory = tiny_model(None, family, **overrides)
    oracle, rows = stock(directory, causal), texts()
    for got, ids in zip(packed(ours(directory, causal), rows), rows, strict=True):
        assert relative(got, oracle(ids)) <= 1e-5


@MODES
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "mistral-window", "qwen2", "qwen3"])
def test_bf16_error_is_at_most_one_and_a_half_that_of_transformers(
    tiny_model, stock, ours, name, causal
):
    family, overrides = MODELS[name]
    directory = tiny_model(None, family, **overrides)  # its weights are exact in bf16
    rows = texts()
    oracle, stock_bf16 = stock(directory, causal), stock(directory, causal, torch.bfloat16)
    truth = torch.cat([oracle(ids) for ids in rows])
    theirs = torch.cat([stock_bf16(ids).float() for ids in rows])
    mine = torch.cat(packed(ours(directory, causal, torch.bfloat16), rows))
    assert mine.dtype == torch.bfloat16
    assert (mine.float() - truth).norm() <= 1.5 * (theirs - truth).norm()


@MODES
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen2-window", "qwen3"])
def test_packed_is_each_text_alone_and_padded(tiny_model, stock, ours, name, causal):
    family, overrides = MODELS[name]
    directory = tiny_model(None, family, **overrides)
    model, rows = ours(directory, causal), texts()
    together = packed(model, rows)
    for got, ids in zip(together, rows, strict=True):
        assert relative(got, packed(model, [ids])[0]) <= 1e-5
    oracle, width = stock(directory, causal).model, max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        padded = oracle(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)
        ).last_hidden_state
    for got, theirs, row in zip(together, padded, rows, strict=True):
        assert relative(got, theirs[width - len(row) :]) <= 1e-5


@MODES
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_text_never_changes_its_neighbours(tiny_model, ours, backend, causal):
    model, rows = ours(tiny_model(None, "llama"), causal), texts((9, 9, 1, 14))
    changed = [rows[0], [(id_ + 1) % 300 for id_ in rows[1]], rows[2], rows[3]]
    with ops.use(backend, "attention"):
        before, after = packed(model, rows), packed(model, changed)
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen2", "qwen3"])
def test_later_tokens_count_exactly_when_bidirectional(tiny_model, ours, name, backend):
    family, overrides = MODELS[name]
    directory = tiny_model(None, family, **overrides)
    row = texts((12,))[0]
    other = [*row[:-1], (row[-1] + 1) % 300]
    with ops.use(backend, "attention"):
        causal = ours(directory, causal=True)
        one, two = packed(causal, [row])[0], packed(causal, [other])[0]
        both = ours(directory, causal=False)
        free_one, free_two = packed(both, [row])[0], packed(both, [other])[0]
    assert relative(one[:-1], two[:-1]) <= 1e-6
    assert relative(one[-1], two[-1]) > 1e-3
    for position in range(len(row)):
        assert relative(free_one[position], free_two[position]) > 1e-5


def test_bidirectional_attention_drops_the_window(tiny_model, ours):
    windowed = ours(tiny_model(None, "mistral", sliding_window=3))
    unlimited = ours(tiny_model(None, "mistral", sliding_window=None))
    rows = texts()
    for one, two in zip(packed(windowed, rows), packed(unlimited, rows), strict=True):
        assert torch.equal(one, two)


def test_causal_attention_keeps_the_window(tiny_model, ours):
    windowed = ours(tiny_model(None, "mistral", sliding_window=3), causal=True)
    unlimited = ours(tiny_model(None, "mistral", sliding_window=None), causal=True)
    ids = texts((20,))
    one, two = packed(windowed, ids)[0], packed(unlimited, ids)[0]
    assert relative(one[:3], two[:3]) <= 1e-6
    assert relative(one[3:], two[3:]) > 1e-3


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_tables_are_those_of_transformers_far_out(tiny_model, stock, kind):
    theta = 5_000.0
    told = {"rope_type": kind, "rope_theta": theta}
    rope = Rope(theta)
    if kind == "linear":
        told["factor"], rope = 3.0, Rope(theta, "linear", 3.0)
    elif kind == "llama3":
        told, rope = LLAMA3 | {"rope_theta": theta}, Rope(theta, "llama3", 8.0, 1.0, 4.0, 64)
    directory = tiny_model(None, "llama", head_dim=64, rope_parameters=told)
    positions = torch.arange(500)[None]
    want_cos, want_sin = stock(directory, True).model.rotary_emb(torch.zeros(1), positions)
    cos, sin = rope_tables(rope, 64, 500, torch.device("cpu"))
    # An angle of 500 has 3e-5 left of fp32's precision: that is the noise of either side.
    torch.testing.assert_close(cos, want_cos[0, :, :32], rtol=0, atol=6e-5)
    torch.testing.assert_close(sin, want_sin[0, :, :32], rtol=0, atol=6e-5)


def test_texts_beyond_the_first_rope_table(tiny_model, stock, ours):
    directory = tiny_model(None, "llama", max_position_embeddings=2048)
    model = ours(directory)
    packed(model, texts((3,)))  # builds the small table, which must grow
    ids = texts((700,))
    assert relative(packed(model, ids)[0], stock(directory, False)(ids[0])) <= 1e-5


def test_gradients_flow_after_the_load_time_check(tiny_model, stock, ours):
    """The check runs in inference mode; what it leaves behind must not break training."""
    directory = tiny_model(None, "qwen3")
    model = ours(directory)
    check_attention_mode(model)
    model.requires_grad_(True)
    rows = texts((5, 8))
    model(PackedBatch.build(rows)).square().sum().backward()
    oracle = stock(directory, False).model
    for ids in rows:
        oracle(input_ids=torch.tensor([ids])).last_hidden_state.square().sum().backward()
    theirs, mine = oracle.layers[0].self_attn, model.layers[0].attn.qkv.weight.grad
    want = torch.cat(
        [theirs.q_proj.weight.grad, theirs.k_proj.weight.grad, theirs.v_proj.weight.grad]
    )
    assert relative(mine, want) <= 1e-4
    assert relative(model.embed.weight.grad, oracle.embed_tokens.weight.grad) <= 1e-4


ENGLISH = (
    "The committee approved the budget after a long discussion about school buildings.",
    "A fox.",
    "Whales sing to each other across whole oceans, and nobody is quite sure what they say; "
    "some of the songs change from year to year, as fashions do.",
)


@pytest.fixture(scope="module")
def real_oracle(smollm2, stock):
    """(dtype, causal, rows) -> all hidden states, by transformers; one load serves both modes."""
    models = {
        torch.float64: stock(smollm2, True, torch.float64, wide_norms=True),
        torch.float32: stock(smollm2, True, torch.float32),
    }

    def run(dtype, causal, rows):
        models[dtype].model.config.is_causal = causal
        return torch.cat([models[dtype](ids) for ids in rows])

    return run


@MODES
def test_real_model_equals_transformers(smollm2, real_oracle, ours, causal):
    """SmolLM2-135M, which was trained to be causal.

    Made bidirectional without training it amplifies rounding: two correct fp32 programs differ by
    more than 1e-5. So the mathematics is compared in fp64, where nothing hides, and fp32 by its
    distance to fp64: at most twice that of transformers' own fp32.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids for text in ENGLISH]
    truth = real_oracle(torch.float64, causal, rows)
    theirs = real_oracle(torch.float32, causal, rows)
    exact = torch.cat(packed(ours(smollm2, causal, torch.float64), rows))
    assert relative(exact, truth) <= 1e-9
    mine = torch.cat(packed(ours(smollm2, causal), rows))
    assert (mine - truth).norm() <= 2 * (theirs - truth).norm()
    if causal:
        assert relative(mine, theirs) <= 1e-5


def test_rope_tables_made_in_inference_mode_serve_a_backward_pass(tiny_model, ours):
    model = ours(tiny_model(None, "llama"))
    batch = PackedBatch.build([[5, 6, 7]])
    with torch.inference_mode():
        model(batch)
    assert not any(table.is_inference() for table in model._rope)
