"""Adapters in training: fresh ones change nothing, PEFT reads what is saved and the other way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import ModelConfig, adapt, lora
from llm2vec_fast.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = [5, 6, 7, 200, 8, 9, 210, 11]
ALL = sorted(lora.TARGETS)


@torch.no_grad()
def states(model: Transformer) -> torch.Tensor:
    return model(PackedBatch.build([IDS]))


@torch.no_grad()
def train_at_random(model: Transformer, seed: int = 0) -> Transformer:
    """Adapters as if trained: A and B anything but zero."""
    noise = torch.Generator().manual_seed(seed)
    for _, a_RD, b_OR in adapt.factors(model):
        a_RD.copy_(0.3 * torch.randn(a_RD.shape, generator=noise))
        b_OR.copy_(0.3 * torch.randn(b_OR.shape, generator=noise))
    return model


def saved(model: Transformer, directory: Path, base: Path, **settings) -> Path:
    directory.mkdir()
    adapt.save(model, directory, str(base), **settings)
    return directory


def bidirectional(base: Path, head: bool = False):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.is_causal = False
    return (AutoModelForCausalLM if head else AutoModel).from_pretrained(base, config=config)


@torch.no_grad()
def by_peft(base: Path, *adapters: Path) -> torch.Tensor:
    """Hidden states (L, D): PEFT merges all adapters but the last, which stays beside."""
    from peft import PeftModel

    model = bidirectional(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")  # PEFT only warns of them
        for adapter in adapters:
            if isinstance(model, PeftModel):
                model = model.merge_and_unload()
            model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()(input_ids=torch.tensor([IDS])).last_hidden_state[0]


def merged(base: Path, *adapters: Path) -> Transformer:
    """As LLM2Vec.from_pretrained makes it for inference."""
    found = LLM2Vec.from_pretrained(base, list(adapters), dtype="float32", device="cpu")
    return found.model


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.fixture
def base(tiny_model, add_tokenizer, tmp_path) -> Path:
    return add_tokenizer(tiny_model(tmp_path, "llama", causal_lm=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fresh_adapters_change_nothing(tiny_model, ours, family):
    model = ours(tiny_model(None, family))
    before = states(model)
    adapt.attach(model.requires_grad_(True), 4, 8)
    assert torch.equal(states(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if n.endswith((".a", ".b"))}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert len(trainable) == 2 * 4 * model.config.n_layers
    assert len(list(adapt.factors(model))) == 7 * model.config.n_layers
    assert not torch.equal(states(train_at_random(model)), before)


def test_bf16_base_with_fp32_adapters(tiny_model, ours):
    model = ours(tiny_model(None, "llama"), dtype=torch.bfloat16)
    before = states(model)
    adapt.attach(model, 4, 8)
    assert torch.equal(states(model), before) and before.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_beginning_is_distributed_as_that_of_peft(base, ours):
    from peft import LoraConfig, get_peft_model

    model = ours(base)
    adapt.attach(model, 64, 128)
    theirs = get_peft_model(bidirectional(base), LoraConfig(r=64, target_modules=ALL))
    weights = dict(theirs.named_parameters())
    for name, a_RD, b_OR in adapt.factors(model):
        want = weights[f"base_model.model.{name}.lora_A.default.weight"]
        assert a_RD.shape == want.shape and b_OR.count_nonzero() == 0
        bound = a_RD.shape[1] ** -0.5
        for values in (a_RD, want):  # both uniform on the same interval
            assert 0.99 * bound < values.abs().max() <= bound
            assert values.mean().abs() < 0.05 * bound
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    drawn = torch.cat([a_RD.flatten() for _, a_RD, _ in adapt.factors(model)])
    assert len(drawn.unique()) > 0.99 * len(drawn)  # no two projections start alike


def test_the_beginning_is_a_function_of_the_seed(base, ours):
    def first(seed):
        model = ours(base)
        adapt.attach(model, 4, 8, seed=seed)
        return torch.cat([a_RD.flatten() for _, a_RD, _ in adapt.factors(model)])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "up_proj"], ["down_proj"]])
def test_some_projections_only(base, ours, tmp_path, targets):
    model = ours(base)
    adapt.attach(model, 3, 5, targets)
    train_at_random(model)
    assert {name.rsplit(".", 1)[1] for name, *_ in adapt.factors(model)} == set(targets)
    adapter = saved(model, tmp_path / "adapter", base)
    assert json.loads((adapter / lora.CONFIG).read_text())["target_modules"] == sorted(targets)
    assert_same(states(model), by_peft(base, adapter))
    assert_same(states(merged(base, adapter)), states(model))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((4, 8, ["q_proj", "qkv_proj"]), "'qkv_proj'.*choose among"),
        ((4, 8, []), "empty.*choose among"),
        ((0, 8), "at least 1, got 0"),
    ],
)
def test_what_is_refused_leaves_the_model_alone(base, ours, arguments, told):
    model = ours(base)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=told):
        adapt.attach(model, *arguments)
    assert all(p.requires_grad for p in model.parameters())
    assert list(adapt.factors(model)) == []


def test_a_second_adapter_is_refused_and_the_first_still_trains(base, ours):
    model = ours(base)
    adapt.attach(model, 4, 8, ["q_proj"])
    for targets in (["q_proj"], ["down_proj"]):
        with pytest.raises(ValueError, match="adapters in training already"):
            adapt.attach(model, 4, 8, targets)
    assert all(a.requires_grad and b.requires_grad for _, a, b in adapt.factors(model))
    assert len(list(adapt.factors(model))) == model.config.n_layers


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_peft_reads_what_is_saved(tiny_model, add_tokenizer, ours, tmp_path, family):
    base = add_tokenizer(tiny_model(tmp_path, family, causal_lm=True))
    model = ours(base)
    adapt.attach(model, 4, 7)
    train_at_random(model)
    adapter = saved(model, tmp_path / "adapter", base, dropout=0.05)
    assert_same(states(model), by_peft(base, adapter))
    assert_same(states(merged(base, adapter)), states(model))


def test_peft_reads_it_beside_a_model_with_a_head(base, ours, tmp_path):
    """The official layout is that of a bare model: inside a causal LM it belongs to `.model`."""
    from peft import PeftModel

    model = ours(base)
    adapt.attach(model, 4, 8)
    adapter = saved(train_at_random(model), tmp_path / "adapter", base)
    theirs = bidirectional(base, head=True)
    theirs.model = PeftModel.from_pretrained(theirs.model, str(adapter)).merge_and_unload()
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor([IDS]), output_hidden_states=True)
    assert_same(states(model), out.hidden_states[-1][0])


def test_what_is_written(base, ours, tmp_path):
    model = ours(base)
    adapt.attach(model, 7, 29)  # 29 / 7 * 7 is not 29 in floating point
    train_at_random(model)
    adapter = saved(model, tmp_path / "adapter", base, dropout=0.05, dtype=torch.bfloat16)
    config = json.loads((adapter / lora.CONFIG).read_text())
    told = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type")}
    assert told == {"r": 7, "lora_alpha": 29, "lora_dropout": 0.05, "bias": "none"} | {
        "peft_type": "LORA"
    }
    assert isinstance(config["lora_alpha"], int) and config["task_type"] is None
    assert config["base_model_name_or_path"] == str(base) and config["target_modules"] == ALL
    tensors = load_file(adapter / lora.WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    key = "base_model.model.layers.1.mlp.down_proj.lora_A.weight"  # the official name
    factors = {name: a_RD for name, a_RD, _ in adapt.factors(model)}
    assert torch.equal(tensors[key], factors["layers.1.mlp.down_proj"].bfloat16())
    assert len(tensors) == 2 * 7 * model.config.n_layers
    lora.open_adapter(adapter, ModelConfig.from_file(base / "config.json"))


def test_adapters_of_peft_are_merged_before_a_fresh_one(base, tmp_path):
    """MNTP by PEFT on a causal LM, merged; SimCSE trained here, saved; both loaded as a stack."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        bidirectional(base, head=True), LoraConfig(r=5, lora_alpha=9, target_modules=ALL)
    )
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=noise))
        hidden = theirs(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    mntp = tmp_path / "mntp"
    theirs.save_pretrained(mntp)

    model = merged(base, mntp)
    after_mntp = states(model)
    assert_same(after_mntp, hidden[-1][0])
    adapt.attach(model, 4, 8)
    assert torch.equal(states(model), after_mntp)
    simcse = saved(train_at_random(model), tmp_path / "simcse", base)
    assert_same(states(merged(base, mntp, simcse)), states(model))
    assert (states(model) - after_mntp).abs().max() > 0.1 * after_mntp.abs().max()


def test_a_stack_of_two_trained_here_is_that_of_peft(base, ours, tmp_path):
    first = ours(base)
    adapt.attach(first, 4, 8)
    mntp = saved(train_at_random(first), tmp_path / "mntp", base)
    second = merged(base, mntp)
    adapt.attach(second, 2, 6, ["q_proj", "gate_proj"])
    simcse = saved(train_at_random(second, 1), tmp_path / "simcse", base)
    assert_same(states(second), by_peft(base, mntp, simcse))
    assert_same(states(merged(base, mntp, simcse)), states(second))
