"""A base sharded over two ranks (FSDP2, gloo) trains the adapter that a whole base trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llm2vec_fast.train.config import load
from llm2vec_fast.train.run import refuse_impossible

WORKER = """
import json, sys
import torch.distributed as dist
from llm2vec_fast.train import load, train

def figures(encoder):
    return {"length": float(encoder.encode(["a list of values", "an error"]).norm())}

dist.init_process_group("gloo")  # FSDP2's mesh does not outlive its group
for given in json.loads(sys.argv[1]):
    train(load(given.pop("kind"), None, given)[0], figures)
    assert dist.is_initialized()  # whose it is not to end
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tiny_model, add_tokenizer, tmp_path_factory):
    """{(kind, sharded): output directory} of four trainings in one pair of processes."""
    place = tmp_path_factory.mktemp("shard")
    base = add_tokenizer(tiny_model(place, "llama", causal_lm=True, tie_word_embeddings=False))
    (place / "texts.txt").write_text("\n".join(f"a list of values, number {n}" for n in range(40)))
    common = {
        "model_name_or_path": str(base),
        "train_file": str(place / "texts.txt"),
        "torch_dtype": "float32",
        "device": "cpu",
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_seq_length": 16,
        "learning_rate": 1e-3,
        "lora_r": 4,
    }
    runs = [
        {**common, **own, "fsdp": sharded, "output_dir": str(place / f"{own['kind']}-{sharded}")}
        for own in ({"kind": "mntp"}, {"kind": "simcse", "tokens_per_batch": 32})
        for sharded in (False, True)
    ]
    script = place / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        (kind, sharded): place / f"{kind}-{sharded}"
        for kind in ("mntp", "simcse")
        for sharded in (False, True)
    }


@pytest.mark.parametrize("kind", ["mntp", "simcse"])
def test_sharding_changes_no_bit(trained, kind):
    whole, sharded = trained[kind, False], trained[kind, True]
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k in ("step", "loss", "length")}
            for line in (directory / "training_log.jsonl").read_text().splitlines()
        ]
        for directory in (whole, sharded)
    ]
    assert logs[0] == logs[1] and sum("loss" in line for line in logs[0]) == 3
    assert sum("length" in line for line in logs[0]) == 2  # before the first step and at the end
    one, other = (load_file(d / "adapter_model.safetensors") for d in (whole, sharded))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert any(tensor.any() for name, tensor in other.items() if "lora_B" in name)


def test_a_sharded_base_is_frozen(tmp_path: Path):
    given = {"model_name_or_path": "m", "output_dir": str(tmp_path), "train_file": "t"}
    config, _ = load("mntp", None, given | {"fsdp": True, "full_finetuning": True})
    with pytest.raises(ValueError, match="set full_finetuning or fsdp, not both"):
        refuse_impossible(config)
