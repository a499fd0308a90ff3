"""The map of weight names, read both ways; what does not fit is refused before it costs memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm2vec_fast
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import ModelConfig, checkpoint, weights
from llm2vec_fast.model.checkpoint import WeightsError

FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": True, "head_dim": 20},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
}
CPU = torch.device("cpu")


def config_of(directory: Path) -> ModelConfig:
    return ModelConfig.from_file(directory / "config.json")


def load(directory: Path, dtype=torch.float32):
    return weights.load(directory, config_of(directory), True, dtype, CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(tiny_model, stock, tmp_path, name):
    directory = tiny_model(tmp_path, name.split("-")[0], **FAMILIES[name])
    before = load_file(directory / "model.safetensors")
    model = load(directory)
    (directory / "model.safetensors").unlink()
    weights.save(model, directory)
    after = load_file(directory / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    ids = [5, 6, 7, 200, 8]
    with torch.no_grad():
        mine = model(PackedBatch.build([ids]))
    torch.testing.assert_close(mine, stock(directory, True)(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_covers_every_parameter_once(tiny_model, name):
    config = config_of(tiny_model(None, name.split("-")[0], **FAMILIES[name]))
    model = weights.load(tiny_model(None, name.split("-")[0], **FAMILIES[name]), config, True,
                         torch.float32, CPU)  # fmt: skip
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.zero_()
    for slot in weights.name_map(config).values():
        part = weights.rows_of(parameters[slot.parameter], slot, config)
        assert part.shape == slot.shape
        part.add_(1)
    assert all((parameter == 1).all() for parameter in parameters.values())


def test_half_precision_is_kept_on_the_way_out(tiny_model, tmp_path):
    directory = tiny_model(None, "llama")  # its values are exact in bf16
    weights.save(load(directory, torch.bfloat16), tmp_path)
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert all(torch.equal(after[key].float(), tensor) for key, tensor in before.items())


def same_weights(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_shards_are_the_single_file(tiny_model, tmp_path, monkeypatch):
    single = load(tiny_model(None, "llama"))
    theirs = tiny_model(None, "llama", shard_bytes=60_000)
    assert len(list(theirs.glob("*.safetensors"))) > 2
    assert same_weights(load(theirs), single)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    weights.save(single, tmp_path)
    (tmp_path / "config.json").write_bytes((theirs / "config.json").read_bytes())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 60_000 + 4096 for shard in shards)
    assert same_weights(load(tmp_path), single)


def test_saving_over_the_other_form_leaves_no_old_weights(tiny_model, tmp_path, monkeypatch):
    old, new = load(tiny_model(None, "llama")), load(tiny_model(None, "llama", seed=1))
    (tmp_path / "config.json").write_bytes((tiny_model(None, "llama") / "config.json").read_bytes())
    weights.save(old, tmp_path)
    with monkeypatch.context() as small:
        small.setattr(checkpoint, "SHARD_BYTES", 60_000)
        weights.save(new, tmp_path)
    assert same_weights(load(tmp_path), new)
    weights.save(old, tmp_path)
    assert same_weights(load(tmp_path), old)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_our_shards_load_in_transformers(tiny_model, stock, tmp_path, monkeypatch):
    directory = tiny_model(tmp_path, "qwen3")
    want = stock(directory, True)([5, 6, 7])
    model = load(directory)
    (directory / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    weights.save(model, directory)
    assert (directory / "model.safetensors.index.json").exists()
    assert torch.equal(stock(directory, True)([5, 6, 7]), want)


@pytest.mark.parametrize("tied", [False, True])
def test_names_of_a_causal_lm_are_the_bare_names(tiny_model, tied):
    overrides = {"tie_word_embeddings": tied}
    whole = tiny_model(None, "llama", causal_lm=True, **overrides)
    names = load_file(whole / "model.safetensors").keys()
    assert "model.norm.weight" in names
    assert ("lm_head.weight" in names) == (not tied)
    bare = {k.removeprefix("model."): v for k, v in load_file(whole / "model.safetensors").items()}
    parameters = dict(load(whole).named_parameters())
    assert torch.equal(parameters["norm.weight"], bare["norm.weight"])
    assert torch.equal(parameters["embed.weight"], bare["embed_tokens.weight"])


def test_what_an_encoder_does_not_need_is_passed_over(tiny_model, tmp_path):
    directory = tiny_model(tmp_path, "llama")
    want = load(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {
        "lm_head.weight": torch.zeros(300, 48),
        "score.weight": torch.zeros(2, 48),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6),
    }
    save_file(tensors, directory / "model.safetensors")
    assert same_weights(load(directory), want)


# --- what does not fit


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def refused(directory: Path, monkeypatch, *told: str) -> None:
    def allocation(*args, **kwargs):
        raise AssertionError("something was allocated")

    config = config_of(directory)
    monkeypatch.setattr(torch, "empty", allocation)
    monkeypatch.setattr(weights, "Transformer", allocation)
    with pytest.raises(WeightsError) as error:
        weights.load(directory, config, False, torch.float32, CPU)
    for part in (str(directory), *told):
        assert part in str(error.value)


def test_missing_weights(tiny_model, tmp_path, monkeypatch):
    directory = tiny_model(tmp_path, "llama")
    rewrite(directory, lambda tensors: tensors.pop("layers.1.self_attn.v_proj.weight"))
    refused(directory, monkeypatch, "1 missing", "layers.1.self_attn.v_proj.weight")


def test_unexpected_weights(tiny_model, tmp_path, monkeypatch):
    directory = tiny_model(tmp_path, "llama")
    rewrite(directory, lambda t: t.update({"layers.2.mlp.up_proj.weight": torch.zeros(80, 48)}))
    refused(directory, monkeypatch, "1 unexpected", "layers.2.mlp.up_proj.weight")


def test_biases_that_the_config_does_not_have(tiny_model, tmp_path, monkeypatch):
    directory = tiny_model(tmp_path, "llama", attention_bias=True)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"attention_bias": False}))
    refused(directory, monkeypatch, "8 unexpected", "layers.0.self_attn.k_proj.bias", "...")


@pytest.mark.parametrize("shape", [(48, 49), (49, 48), (48,), (48, 48, 1), (2304,), ()])
def test_misshapen_weights(tiny_model, tmp_path, monkeypatch, shape):
    directory, name = tiny_model(tmp_path, "llama"), "layers.0.self_attn.o_proj.weight"
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(directory, monkeypatch, "model.safetensors", name, str(tuple(shape)), "(48, 48)")


def test_a_config_of_another_model(tiny_model, tmp_path, monkeypatch):
    """Allowed sizes that would take terabytes: refused by the headers, not by the machine."""
    directory = tiny_model(tmp_path, "llama")
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"hidden_size": 16_384, "intermediate_size": 200_000, "vocab_size": 1_000_000}
    (directory / "config.json").write_text(json.dumps(raw))
    refused(directory, monkeypatch, "shape", "16384")


def test_a_name_with_and_without_its_prefix(tiny_model, tmp_path, monkeypatch):
    directory = tiny_model(tmp_path, "llama")
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48)}))
    refused(directory, monkeypatch, "'norm.weight'", "prefix")


# --- memory

MEASURE = """
import functools, sys, threading, time, torch
from pathlib import Path
from llm2vec_fast.model import ModelConfig, checkpoint, weights
from llm2vec_fast.model.heap import keep_freed_memory

def private():  # without pages of files, which the system takes and gives back as it likes
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def load(directory):
    config = ModelConfig.from_file(Path(directory) / "config.json")
    return weights.load(Path(directory), config, False, dtype, torch.device("cpu"))

def watch():
    while not done:
        seen.append(private())
        time.sleep(0.002)

checkpoint.Reader = functools.partial(checkpoint.Reader, threads=4)
small, big, dtype = *sys.argv[1:3], getattr(torch, sys.argv[3])
if sys.argv[4] == "keep":
    keep_freed_memory()  # as LLM2Vec.from_pretrained does on the CPU
load(small)
done, seen, before = False, [], private()
watcher = threading.Thread(target=watch)
watcher.start()
model = load(big)
done = True
watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
assert size > 190e6 and len(seen) > 10
print((max(*seen, private()) - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_loading_needs_no_second_copy(tiny_model, tmp_path):
    """Peak memory grows by at most 1.2 times the weights, in the dtype they are loaded to.

    Each in a process of its own: a heap that has served another load hides what this one wastes.
    """
    config = {
        "model_type": "llama", "vocab_size": 20_000, "hidden_size": 1024,
        "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    slots = weights.name_map(ModelConfig.from_dict(config))
    some = torch.full((max(torch.Size(s.shape).numel() for s in slots.values()),), 0.01).bfloat16()
    save_file(
        {
            name: some[: torch.Size(s.shape).numel()].view(s.shape).clone()
            for name, s in slots.items()
        },
        tmp_path / "model.safetensors",
    )
    root = str(Path(llm2vec_fast.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    paths = [str(tiny_model(None, "llama")), str(tmp_path)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, *paths, *how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for how in (("bfloat16", "keep"), ("bfloat16", "return"), ("float32", "keep"))
    ]
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert 0.9 < float(out) <= 1.2, out
