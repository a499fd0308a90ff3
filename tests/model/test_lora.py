"""LoRA adapters against PEFT itself: read, merged, stacked, written back, refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import ModelConfig, lora
from llm2vec_fast.model.checkpoint import WeightsError
from llm2vec_fast.model.lora import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = [5, 6, 7, 200, 8, 9, 210, 11]
TEXTS = ["a list of whole numbers", "return the object", "x"]


def peft_adapter(base: Path, out: Path, *, causal_lm=False, seed=0, **settings) -> Path:
    """An adapter as PEFT saves it, trained by a random number generator."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL} | settings
    model = (AutoModelForCausalLM if causal_lm else AutoModel).from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(**settings))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(peft.named_parameters()):
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=noise))
    peft.save_pretrained(out)
    return out


def by_peft(base: Path, *adapters: Path, causal_lm=False) -> torch.Tensor:
    """Hidden states (L, D) by transformers, the adapters merged by PEFT one after the other."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.is_causal = False
    model = (AutoModelForCausalLM if causal_lm else AutoModel).from_pretrained(base, config=config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")  # PEFT only warns of them
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    body = model.model if causal_lm else model
    with torch.no_grad():
        return body(input_ids=torch.tensor([IDS])).last_hidden_state[0]


@pytest.fixture
def by_us(ours):
    @torch.no_grad()
    def run(base: Path, *adapters: Path) -> torch.Tensor:
        config = ModelConfig.from_file(base / "config.json")
        model = ours(base)
        lora.merge(model, [lora.open_adapter(adapter, config) for adapter in adapters])
        return model(PackedBatch.build([IDS]))

    return run


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha is a fraction": {"lora_alpha": 3},
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "one module of one layer": {"target_modules": ["layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.1\.(self_attn\.(k|v)_proj|mlp\.gate_proj)"},
    "all linear": {"target_modules": "all-linear"},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}},
    "alpha pattern": {"alpha_pattern": {"mlp.down_proj": 32, "q_proj": 1}},
    "both patterns, rslora": {
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {r".*\.0\..*up_proj": 5},
        "use_rslora": True,
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layer as a number": {"layers_to_transform": 0, "layers_pattern": "layers"},
}


@pytest.mark.parametrize("causal_lm", [False, True], ids=["bare", "causal-lm"])
@pytest.mark.parametrize("case", CASES)
def test_merging_is_that_of_peft(tiny_model, by_us, tmp_path, case, causal_lm):
    base = tiny_model(None, "llama", causal_lm=causal_lm)
    adapter = peft_adapter(base, tmp_path / "adapter", causal_lm=causal_lm, **CASES[case])
    keys = load_file(adapter / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.") == causal_lm for key in keys)
    want = by_peft(base, adapter, causal_lm=causal_lm)
    assert_same(by_us(base, adapter), want)
    plain = by_us(base)
    assert (want - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families(tiny_model, by_us, tmp_path, family):
    base = tiny_model(None, family, **({"sliding_window": None} if family == "mistral" else {}))
    adapter = peft_adapter(base, tmp_path / "adapter")
    assert_same(by_us(base, adapter), by_peft(base, adapter))


def test_an_adapter_of_either_nesting_fits_either_base(tiny_model, by_us, tmp_path):
    bare, whole = tiny_model(None, "llama"), tiny_model(None, "llama", causal_lm=True)
    adapter = peft_adapter(whole, tmp_path / "adapter", causal_lm=True, task_type="CAUSAL_LM")
    assert_same(by_us(bare, adapter), by_us(whole, adapter))


def test_stacked_adapters_are_merged_one_after_the_other(tiny_model, by_us, tmp_path):
    base = tiny_model(None, "llama")
    one = peft_adapter(base, tmp_path / "one", target_modules=["q_proj", "up_proj"])
    two = peft_adapter(base, tmp_path / "two", seed=1, r=2, target_modules=["up_proj", "o_proj"])
    assert_same(by_us(base, one, two), by_peft(base, one, two))


def test_bf16_weights_are_rounded_once(tiny_model, ours, tmp_path):
    base = tiny_model(None, "llama")
    config = ModelConfig.from_file(base / "config.json")
    adapters = [peft_adapter(base, tmp_path / str(i), seed=i) for i in range(3)]
    opened = [lora.open_adapter(adapter, config) for adapter in adapters]
    exact, rounded = ours(base), ours(base, dtype=torch.bfloat16)
    lora.merge(exact, opened)
    lora.merge(rounded, opened)
    for wide, narrow in zip(exact.parameters(), rounded.parameters(), strict=True):
        torch.testing.assert_close(wide.bfloat16(), narrow, rtol=2**-8, atol=1e-6)


# --- saving


@pytest.fixture
def base(tiny_model, add_tokenizer, tmp_path) -> Path:
    return add_tokenizer(tiny_model(tmp_path, "llama"))


def open_ours(base: Path, adapters=None) -> LLM2Vec:
    return LLM2Vec.from_pretrained(base, adapters, dtype="float32")


ONE_BY_ONE = {
    **{name: ({}, CASES[name]) for name in CASES if name != "all linear"},
    "causal lm": ({"causal_lm": True}, {"task_type": "CAUSAL_LM"}),
    "causal lm, regex": ({"causal_lm": True}, {"target_modules": r"model\.layers\.\d\.mlp.*_proj"}),
    "causal lm, layers": ({"causal_lm": True}, {"layers_to_transform": [1]}),
    "causal lm, full names": (
        {"causal_lm": True},
        {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"],
         "rank_pattern": {"model.layers.0.mlp.up_proj": 3},
         "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_one_adapter_saved_unmerged_loads_in_peft_and_here(base, by_us, tmp_path, case):
    how, settings = ONE_BY_ONE[case]
    adapter = peft_adapter(base, tmp_path / "adapter", **how, **settings)
    model, out = open_ours(base, adapter), tmp_path / "out"
    model.save(out)
    assert not (out / "model.safetensors").exists()
    config = json.loads((out / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == base.resolve()
    want = by_us(base, adapter)
    assert_same(by_peft(base, out), want)  # the official library, too, puts PEFT on the bare model
    assert_same(by_us(base, out), want)
    assert torch.equal(open_ours(out).encode(TEXTS), model.encode(TEXTS))


STACKS = {
    "same modules": ({}, {"r": 2, "lora_alpha": 3}),
    "other modules": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["o_proj"]}),
    "overlapping modules": ({"target_modules": ["q_proj", "up_proj"]}, {}),
    "rslora and patterns": ({"use_rslora": True, "rank_pattern": {"q_proj": 2}},
                            {"alpha_pattern": {"up_proj": 50}}),
    "one layer each": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "regex": ({"target_modules": r".*layers\.0\..*q_proj"}, {"target_modules": r".*\.1\..*_proj"}),
    "excluded": ({}, {"exclude_modules": ["q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKS)
def test_stacked_adapters_saved_unmerged_load_in_peft_and_here(base, by_us, tmp_path, case):
    one, two = (
        peft_adapter(base, tmp_path / f"adapter-{i}", seed=i, **settings)
        for i, settings in enumerate(STACKS[case])
    )
    model, out = open_ours(base, [one, two]), tmp_path / "out"
    model.save(out)
    want = by_peft(base, one, two)
    assert_same(by_us(base, one, two), want)
    assert_same(by_peft(base, out), want)
    assert_same(by_us(base, out), want)
    again = open_ours(out).encode(TEXTS)
    torch.testing.assert_close(again, model.encode(TEXTS), rtol=0, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert all((adapter / "adapter_config.json").exists() for adapter in (one, two))
    assert config["r"] == max(len(t) for k, t in load_file(
        out / "adapter_model.safetensors").items() if "lora_A" in k)  # fmt: skip


def test_saving_over_the_adapter_itself(base, by_us, tmp_path):
    adapter = peft_adapter(base, tmp_path / "adapter")
    want, model = by_us(base, adapter), open_ours(base, adapter)
    model.save(adapter)
    assert torch.equal(by_us(base, adapter), want)


def test_merged_weights_load_in_stock_transformers(base, by_us, tmp_path):
    from transformers import AutoModel

    adapter = peft_adapter(base, tmp_path / "adapter")
    model, out = open_ours(base, adapter), tmp_path / "out"
    model.save(out, merge_before_save=True)
    assert not (out / "adapter_config.json").exists()
    theirs = AutoModel.from_pretrained(out)  # looks both ways by itself: config.json tells it to
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor([IDS])).last_hidden_state[0]
    assert_same(got, by_us(base, adapter))
    assert torch.equal(open_ours(out).encode(TEXTS), model.encode(TEXTS))


def test_saving_refuses_to_overwrite_what_it_did_not_write(base, tmp_path):
    adapter = peft_adapter(base, tmp_path / "adapter")
    model = open_ours(base, adapter)
    for own, merged in ((base, False), (base, True), (adapter, True)):
        with pytest.raises(ValueError, match="loaded from"):
            model.save(own, merge_before_save=merged)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="another model"):
        model.save(foreign)
    assert (foreign / "model.safetensors").read_bytes() == b"somebody's"


@pytest.mark.parametrize("merged_first", [False, True])
def test_saving_merged_and_unmerged_to_one_place_merges_once(base, tmp_path, merged_first):
    adapter = peft_adapter(base, tmp_path / "adapter")
    model, out = open_ours(base, adapter), tmp_path / "out"
    model.save(out, merge_before_save=merged_first)
    model.save(out, merge_before_save=not merged_first)
    again = open_ours(out).encode(TEXTS)
    torch.testing.assert_close(again, model.encode(TEXTS), rtol=0, atol=1e-5)


def test_exported_bidirectional_weights_have_no_window(tiny_model, add_tokenizer, tmp_path):
    """Stock transformers would look both ways, but only as far as the window reaches."""
    from transformers import AutoModel

    model = open_ours(add_tokenizer(tiny_model(tmp_path, "mistral", sliding_window=3)))
    model.save(tmp_path / "out", merge_before_save=True)
    theirs = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor([IDS])).last_hidden_state[0]
        assert_same(got, model.model(PackedBatch.build([IDS])))


# --- refusals


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    base = tiny_model(None, "llama")
    return peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])


@pytest.fixture
def config(tiny_model) -> ModelConfig:
    return ModelConfig.from_file(tiny_model(None, "llama") / "config.json")


def edit_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def refused(adapter: Path, config: ModelConfig, *told: str, file="adapter_config.json") -> None:
    with pytest.raises(AdapterError) as error:
        lora.open_adapter(adapter, config)
    for part in (str(adapter / file), *told):
        assert part in str(error.value)


WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_WEIGHTS = {
    "doubly nested": lambda t: {k.replace("layers", "model.model.layers"): v for k, v in t.items()},
    "no base_model": lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
    "an adapter's name in the keys": lambda t: {
        k.replace(".weight", ".default.weight"): v for k, v in t.items()},
    "both nestings": lambda t: t | {Q0.replace("layers", "model.layers"): t[Q0].clone()},
    "a key missing": lambda t: {k: v for k, v in t.items() if k != Q0},
    "a module missing": lambda t: {k: v for k, v in t.items() if "layers.0.mlp" not in k},
    "a module too many": lambda t: t | {
        k.replace("q_proj", "v_proj"): v.clone() for k, v in t.items() if "q_proj" in k},
    "a layer too many": lambda t: t | {
        k.replace("layers.1", "layers.2"): v.clone() for k, v in t.items() if "layers.1" in k},
    "the embedding": lambda t: t | {
        "base_model.model.embed_tokens.lora_embedding_A": torch.ones(4)},
    "a head": lambda t: t | {"base_model.lm_head.lora_A.weight": torch.ones(4, 48)},
    "a bias": lambda t: t | {Q0.replace("lora_A.weight", "base_layer.bias"): torch.ones(48)},
    "dora's magnitude": lambda t: t | {
        Q0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(48)},
    "another size": lambda t: t | {Q0: torch.ones(4, 64)},
    "another rank": lambda t: t | {Q0: torch.ones(5, 48)},
    "transposed": lambda t: t | {Q0: torch.ones(48, 4)},
    "three dimensions": lambda t: t | {Q0: torch.ones(1, 4, 48)},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit(adapter, config, case):
    edit_weights(adapter, BAD_WEIGHTS[case])
    refused(adapter, config, file=WEIGHTS)


def test_an_adapter_of_a_larger_model(tiny_model, tmp_path, config):
    other = tiny_model(None, "llama", hidden_size=64, head_dim=16)
    refused(peft_adapter(other, tmp_path / "other"), config, "(4, 64)", "(4, 48)", file=WEIGHTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 8},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "up_proj", "o_proj"]},
        {"target_modules": r"layers\.0\..*"},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
def test_a_config_that_tells_of_other_weights(adapter, config, changes):
    edit_config(adapter, **changes)
    refused(adapter, config, file=WEIGHTS)


BAD_CONFIGS = [
    {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"bias": "lora_only"},
    {"lora_bias": True}, {"fan_in_fan_out": True}, {"layer_replication": [[0, 2]]},
    {"peft_type": "IA3"}, {"peft_type": None}, {"peft_type": ["LORA"]},
    *({"r": r} for r in (0, -4, None, "4", True, float("nan"), float("inf"), [4])),
    *({"lora_alpha": a} for a in (0, -1, None, "8", float("nan"), float("inf"), 10**400)),
    *({"target_modules": t} for t in (None, 3, [3], [None], "(", {"q_proj": 3})),
    *({"layers_to_transform": t} for t in ("0", ["0"], {"a": 1}, 1.5, [[0]])),
    *({key: pattern} for key in ("rank_pattern", "alpha_pattern") for pattern in (
        ["q_proj"], "q_proj", {"(": 4}, {"(?i)q_proj": 4}, {"q_proj": "4"}, {"q_proj": 0},
        {"q_proj": None}, {"q_proj": float("nan")}, {"q_proj": float("inf")}, {"q_proj": 10**400},
    )),
    # These start from a changed base: W + BA is not what was trained.
    *({"init_lora_weights": i} for i in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")),
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD_CONFIGS, ids=lambda changes: f"{changes!r:.50}")
def test_hostile_and_unsupported_configs(adapter, config, changes):
    edit_config(adapter, **changes)
    with pytest.raises(AdapterError) as error:
        lora.open_adapter(adapter, config)
    assert str(adapter) in str(error.value)
    assert next(iter(changes)) in str(error.value) or "LoRA" in str(error.value)


@pytest.mark.parametrize("content", ["", "x", "[]", "null", "[" * 100_000, "{"], ids=repr)
def test_a_config_that_is_no_json_object(adapter, config, content):
    (adapter / "adapter_config.json").write_text(content)
    refused(adapter, config)


def test_files_that_are_missing(adapter, config):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(adapter, config, "pickle", file=WEIGHTS)
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, config, "is missing", file=WEIGHTS)
    (adapter / "adapter_config.json").unlink()
    refused(adapter, config)


def test_malformed_and_non_finite_files_are_named(adapter, tiny_model, tmp_path, config, ours):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors"):
        lora.open_adapter(copy, config)
    edit_weights(adapter, lambda t: t | {Q0: torch.full((4, 48), float("nan"))})
    opened, model = lora.open_adapter(adapter, config), ours(tiny_model(None, "llama"))
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors.*q_proj\.lora_A"):
        lora.merge(model, [opened])


def test_whole_numbers_are_no_lora_weights(adapter, config):
    edit_weights(adapter, lambda t: t | {Q0: torch.ones(4, 48, dtype=torch.int64)})
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors.*I64"):
        lora.open_adapter(adapter, config)
