"""The forward pass in fp8: what it computes, what it keeps, what a GPU would be asked to do."""

from __future__ import annotations

import json
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm2vec_fast import LLM2Vec, ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.corpus import embed, search
from llm2vec_fast.model import ModelConfig, Transformer, adapt, fp8
from llm2vec_fast.model.transformer import Linear, Norm
from llm2vec_fast.settings import choose_dtype

TEXTS = ["a cat", "The quick brown fox jumps over the lazy dog.", "dict() -> new dictionary"]
MODELS = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"head_dim": 12}),
    "qwen3": ("qwen3", {}),
}
SIZES = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    path = tiny_model(tmp_path_factory.mktemp("fp8"), "llama", num_hidden_layers=3)
    return add_tokenizer(path)


@pytest.fixture(scope="module")
def adapter(directory, tmp_path_factory):
    """An adapter that changes every projection."""
    path, model = tmp_path_factory.mktemp("adapter"), LLM2Vec.from_pretrained(directory).model
    adapt.attach(model, 4, 8.0)
    for part in model.modules():
        if isinstance(part, Linear):
            nn.init.normal_(part.lora.b, std=0.1, generator=torch.Generator().manual_seed(1))
    adapt.save(model, path, str(directory))
    return path


class Spelled(nn.Module):
    """A product in fp8 by its definition, in fp32 but for the result."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.weight, self.bias = self.rounded(linear.weight), linear.bias

    @staticmethod
    def rounded(x):
        x = x.float()
        scale = x.abs().amax(1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    def forward(self, x, drop=None):
        y = self.rounded(x) @ self.weight.t()
        return (y if self.bias is None else y + self.bias.float()).bfloat16()

    def after_swiglu(self, gate_up_T2F, drop=None):
        gate, up = gate_up_T2F.float().chunk(2, 1)
        return self(nn.functional.silu(gate) * up)


class WideNorm(Norm):
    def __init__(self, norm: Norm):
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x_TD, residual_TD):
        r_TD = x_TD if residual_TD is None else x_TD + residual_TD
        return ops.add_rms_norm_ref(r_TD.float(), None, self.weight.float(), self.eps)[0], r_TD


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        kind = {"_scaled_mm": "fp8", "mm": "plain", "linear": "plain"}.get(name)
        self.found[kind] += kind is not None
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("keep", [(), ("down",), ("qkv",), ("attn",), ("gate_up",)])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_computes_what_it_says(tiny_model, ours, name, keep):
    family, overrides = MODELS[name]
    bf16, model = (
        ours(tiny_model(None, family, **overrides), dtype=torch.bfloat16) for _ in range(2)
    )
    fp8.quantize_(model, keep)
    batch = PackedBatch.build([range(5, 28), range(7), [3]])
    rope, truth = bf16.rope_tables(batch.max_seqlen, batch.ids.device), bf16.layers[1]
    x_TD, residual_TD = bf16.layers[0](bf16.embed(batch.ids), None, batch, rope)
    want_bf16 = truth(x_TD, residual_TD, batch, rope)
    for part, child in (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down")):
        if {part, child}.isdisjoint(keep):
            half = getattr(truth, part)
            setattr(half, child, Spelled(getattr(half, child)))
            if child in ("qkv", "gate_up"):
                setattr(truth, f"{part}_norm", WideNorm(getattr(truth, f"{part}_norm")))
    got, want = (
        sum(layer(x_TD, residual_TD, batch, rope)).float() for layer in (model.layers[1], truth)
    )
    off, e4m3 = (got - want).norm(), (sum(want_bf16).float() - want).norm()
    # A value on the edge may round to the other side: rarely, so that the sum hardly moves.
    assert off < 0.2 * e4m3 and off < 3e-3 * want.norm()


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ((), []),
        (("down",), ["0.mlp.down", "1.mlp.down", "2.mlp.down"]),
        (("o", "0", "-1"), ["0.attn.o", "0.attn.qkv", "0.mlp.down", "0.mlp.gate_up", "1.attn.o",
                            "2.attn.o", "2.attn.qkv", "2.mlp.down", "2.mlp.gate_up"]),
    ],
)  # fmt: skip
def test_keep_names_parts_of_paths(tiny_model, ours, keep, kept):
    directory = tiny_model(None, "llama", num_hidden_layers=3)
    model = ours(directory, dtype=torch.bfloat16)
    fp8.quantize_(model, keep)
    modules = dict(model.layers.named_modules())
    assert sorted(n for n, m in modules.items() if isinstance(m, Linear)) == kept
    assert sum(isinstance(m, fp8.Fp8Linear) for m in modules.values()) == 12 - len(kept)
    assert model.fp8_keep == keep


def test_one_weight_after_the_other(tiny_model, ours, monkeypatch):
    """Never two whole models: when a weight is quantised, those before it are gone."""
    model = ours(tiny_model(None, "llama"), dtype=torch.bfloat16)
    seen, quantize = [], ops.quantize_rows

    def watched(weight):
        assert not any(old() is not None for old in seen)
        seen.append(weakref.ref(weight.untyped_storage()))
        return quantize(weight)

    monkeypatch.setattr(ops, "quantize_rows", watched)
    fp8.quantize_(model, ())
    assert len(seen) == 8


def test_what_cannot_be_quantised_is_refused(tiny_model, ours):
    directory = tiny_model(None, "llama")
    model = ours(directory, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"\['dwon'\]"):
        fp8.quantize_(model, ("dwon",))
    with pytest.raises(ValueError, match="keeping 0, -1 of 2 layers leaves nothing"):
        fp8.quantize_(model, ("0", "-1"))
    with pytest.raises(ValueError, match=r"bfloat16 model.*float32"):
        fp8.quantize_(ours(directory), ())
    with pytest.raises(ValueError, match=r"multiples of 16.*layers\.0\.mlp\.down.*\(48, 88\)"):
        odd = tiny_model(None, "llama", intermediate_size=88)
        fp8.quantize_(ours(odd, dtype=torch.bfloat16), ())
    adapt.attach(model, 4, 8.0)
    with pytest.raises(ValueError, match="adapter in training"):
        fp8.quantize_(model, ())
    assert model.fp8_keep is None and isinstance(model.layers[0].attn.o, Linear)


def test_adapters_are_merged_before(directory, adapter):
    bf16 = LLM2Vec.from_pretrained(directory, adapter, dtype="bfloat16", device="cpu")
    bare = LLM2Vec.from_pretrained(directory, dtype="bfloat16", device="cpu")
    model = LLM2Vec.from_pretrained(directory, adapter, dtype="fp8", device="cpu")
    assert model.dtype == torch.bfloat16
    fp8.quantize_(bf16.model)
    fp8.quantize_(bare.model)
    for (name, got), want in zip(
        model.model.state_dict().items(), bf16.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got.float(), want.float()), name
    got, want = model.encode(TEXTS), bf16.encode(TEXTS)
    torch.testing.assert_close(got, want)
    assert (bare.encode(TEXTS) - want).abs().max() > 0.05


def test_vectors_are_near_those_of_bf16_and_batches_are_free(directory):
    # Causal: without training, looking both ways turns rounding into other vectors.
    bf16, model = (
        LLM2Vec.from_pretrained(directory, enable_bidirectional=False, dtype=dtype, device="cpu")
        for dtype in ("bfloat16", "fp8")
    )
    got = model.encode([*TEXTS, ""])
    cosine = torch.cosine_similarity(got[:3], bf16.encode(TEXTS))
    assert cosine.min() > 0.98 and cosine.max() < 1 and not got[3].any()
    alone = model.encode(TEXTS, batch_size=1)
    assert torch.cosine_similarity(got[:3], alone).min() > 0.999


def test_a_manifest_says_fp8_and_search_loads_it_so(directory, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    out = tmp_path / "out"
    embed(tmp_path / "in.jsonl", directory, out, dtype="fp8", device="cpu", show_progress=False)
    told = json.loads((out / "manifest.json").read_text())["model"]
    assert told["dtype"] == "fp8" and told["fp8_keep"] == list(fp8.KEEP)
    hit = search(out, TEXTS[1], k=1, device="cpu")[0][0]
    assert hit.score > 0.99
    told = LLM2Vec.from_pretrained(directory, dtype="bfloat16", device="cpu").describe()
    assert told["dtype"] == "bfloat16" and "fp8_keep" not in told


def test_save_writes_the_adapter_and_refuses_rounded_weights(directory, adapter, tmp_path):
    model = LLM2Vec.from_pretrained(directory, adapter, dtype="fp8", device="cpu")
    model.save(tmp_path / "adapter")
    again = LLM2Vec.from_pretrained(tmp_path / "adapter", dtype="fp8", device="cpu")
    assert torch.equal(again.encode(TEXTS), model.encode(TEXTS))
    with pytest.raises(ValueError, match="dtype='bfloat16'"):
        model.save(tmp_path / "merged", merge_before_save=True)
    with pytest.raises(ValueError, match="dtype='bfloat16'"):
        LLM2Vec.from_pretrained(directory, dtype="fp8").save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_gradients_are_refused(tiny_model, ours):
    model = ours(tiny_model(None, "llama"), dtype=torch.bfloat16)
    fp8.quantize_(model, ())
    model.embed.requires_grad_(True)
    with pytest.raises(ValueError, match="is for inference"):
        model(PackedBatch.build([range(5)]))


def test_the_device_must_multiply_fp8(monkeypatch):
    assert choose_dtype("fp8", torch.device("cpu")) == torch.float8_e4m3fn
    for arch, can in ((80, False), (89, True), (90, True)):
        monkeypatch.setattr("llm2vec_fast.ops.backend.arch_of", lambda device, arch=arch: arch)
        if can:
            assert choose_dtype("fp8", torch.device("cuda:1")) == torch.float8_e4m3fn
        else:
            with pytest.raises(ValueError, match=r"fp8.*cuda.*8\.9 or newer.*8\.0.*bfloat16"):
                choose_dtype("fp8", torch.device("cuda"))


@pytest.mark.parametrize("keep", [(), ("down",), ("qkv", "0")])
def test_launches_of_a_layer_and_nothing_waits_for_the_device(keep):
    """As in test_meta.py: a value asked of a meta tensor raises."""
    pytest.importorskip("triton")
    from llm2vec_fast.ops.kernels.launch import recorded

    layers = 3
    config = ModelConfig.from_dict(SIZES | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = Transformer(config).bfloat16().requires_grad_(False)
    model.rope_tables(512, torch.device("meta"))
    built = PackedBatch.build([range(300), range(3)])
    parts = (built.ids, built.positions, built.cu_seqlens, built.spans)
    batch = PackedBatch(*(x.to("meta") for x in parts), built.max_seqlen, built.lengths)
    with ops.use("triton"), ops.use("scaled_mm"):
        fp8.quantize_(model, keep)
        with recorded() as launches, Products() as products, torch.inference_mode():
            hidden_TD = model(batch)
    assert hidden_TD.shape == (303, 48) and hidden_TD.dtype == torch.bfloat16
    found = Counter(x.kernel.fn.__module__.rpartition(".")[2] for x in launches)
    assert found["rope"] == found["attention"] == layers
    quantised = layers - ("0" in keep)
    norms = quantised * (1 if "qkv" in keep else 2)
    down = 0 if "down" in keep else quantised
    assert found["add_rms_norm_fp8"] == norms and found["add_rms_norm"] == 2 * layers + 1 - norms
    assert found["swiglu_fp8"] == down and found["swiglu"] == layers - down
    assert found["quantize_rows"] == quantised  # what attention gives to `o`
    assert len(launches) == 6 * layers + 1 - (layers - quantised)
    in_fp8 = quantised * (4 - len({"down", "qkv"} & {*keep}))
    assert products.found == Counter(fp8=in_fp8, plain=4 * layers - in_fp8)
