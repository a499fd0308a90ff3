"""One rival of bench_train in a process of its own, so that its peak memory is its own.

    python -m benchmarks._train_worker SPEC.json

SPEC: {"rival": "rows" | "ours" | "stock", "model": directory or name of random weights, "kind",
"device", "fields" (of the training's configuration), "steps", "warm_up", "rows" (file), and for
stock "micro", "checkpointing", "attention"}. `rows` writes what a few steps of ours are made of
(ids and labels), which stock then trains on; the others print a line of JSON: seconds of each step,
real tokens a step, loss of each, and memory.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import MODELS, model_of
from llm2vec_fast import LLM2Vec
from llm2vec_fast.model import adapt
from llm2vec_fast.text import Tokens
from llm2vec_fast.train.config import load
from llm2vec_fast.train.data import Chunks
from llm2vec_fast.train.mntp import Mntp
from llm2vec_fast.train.optimizer import Optimizer
from llm2vec_fast.train.ranks import Ranks
from llm2vec_fast.train.run import load_encoder, make_objective
from llm2vec_fast.train.simcse import SimCSE

IGNORED = -100
SIMCSE_SCALE = 20.0


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    run = {"rows": write_rows, "ours": ours, "stock": stock}[spec["rival"]]
    print(json.dumps(run(spec)))


# Ours


class Words:
    """Stands for a tokenizer beside random weights: a text is the number of its tokens."""

    eos_id = 2

    def __init__(self, vocabulary: int):
        self.vocabulary, self.noise = vocabulary, np.random.default_rng(0)
        self.raw = SimpleNamespace(
            token_to_id=lambda name: 3, get_vocab_size=lambda: self.vocabulary
        )

    def __call__(self, texts, instructions) -> list[Tokens]:
        lengths = map(int, texts)
        return [Tokens(self.noise.integers(3, self.vocabulary, n), 0, n) for n in lengths]


def objective_of(spec: dict):
    """(encoder, objective) of a training: through the command's own door, or of random weights."""
    config = load(spec["kind"], None, spec["fields"])[0]
    if spec["model"] not in MODELS:
        encoder = load_encoder(config, torch.device(spec["device"]))
        return encoder, make_objective(config, encoder, Ranks())
    dtype = getattr(torch, spec["dtype"])
    model = model_of(spec["model"], spec["device"], dtype)
    adapt.attach(model, config.lora_r, config.lora_alpha)
    words = Words(model.config.vocab_size)
    encoder = LLM2Vec(model, words, SimpleNamespace(name=spec["model"]), {"pooling_mode": "mean"})
    noise, batch = np.random.default_rng(1), config.per_device_train_batch_size
    if spec["kind"] == "simcse":  # sentences as those of Wiki1M: a few dozen tokens
        lengths = np.clip(noise.lognormal(3.2, 0.5, 8 * batch), 4, config.max_seq_length)
        return encoder, SimCSE(encoder, [str(int(n)) for n in lengths], config, Ranks())
    ids = words.noise.integers(3, model.config.vocab_size, 4 * batch * config.max_seq_length)
    starts = np.arange(4 * batch + 1) * config.max_seq_length
    chunks = Chunks(ids.astype(np.int32), np.zeros(len(ids), bool), starts, 0)
    head_VD = torch.empty_like(model.embed.weight).normal_(0, 0.02)
    return encoder, Mntp(encoder, lambda: head_VD, chunks, None, config, Ranks())


def write_rows(spec: dict) -> dict:
    """The texts of some steps of ours, in order: MNTP's with labels, SimCSE's once each."""
    encoder, objective = objective_of(spec)
    steps = []
    for step in range(spec["steps"]):
        work, texts = objective.prepare(step), []
        for part in work.parts:
            chunks = part.chunks if spec["kind"] == "simcse" else [part]
            found = [text for chunk in chunks for text in _texts(chunk)]
            if spec["kind"] == "simcse":
                found = [found[i] for i in part.order.tolist()][: part.queries]
            texts += found
        steps.append(texts)
    torch.save(steps, spec["rows"])
    lengths = [[len(text["ids"]) for text in texts] for texts in steps]
    return {"texts": [len(n) for n in lengths], "tokens": [sum(n) for n in lengths],
            "padded": [len(n) * max(n) for n in lengths],
            "dtype": str(encoder.dtype).removeprefix("torch.")}  # fmt: skip


def _texts(chunk) -> list[dict[str, Tensor]]:
    """Of each text its ids, labels (MNTP: the true id of a masked token), and what is pooled."""
    ids_T = chunk.batch.ids.long().cpu()
    labels_T, pooled_T = torch.full_like(ids_T, IGNORED), torch.zeros_like(ids_T)
    if hasattr(chunk, "rows_M"):
        labels_T[chunk.rows_M.cpu() + 1] = chunk.targets_M.cpu()
    for start, end in chunk.batch.spans.tolist():
        pooled_T[start:end] = 1
    named = {"ids": ids_T, "labels": labels_T, "pooled": pooled_T}
    lengths = list(chunk.batch.lengths)
    parts = [[part.clone() for part in x.split(lengths)] for x in named.values()]
    return [dict(zip(named, text, strict=True)) for text in zip(*parts, strict=True)]


def ours(spec: dict) -> dict:
    encoder, objective = objective_of(spec)
    optimizer = Optimizer(encoder.model.named_parameters(), learning_rate=5e-5)
    watch = Watch(spec)
    for step in range(spec["warm_up"] + spec["steps"]):
        work = objective.prepare(step)  # beside the step before it in the loop; here it counts
        optimizer.clear()
        loss = objective.backward(work)
        optimizer.step(Ranks())
        watch.step(loss)
    return watch.told() | {"dtype": str(encoder.dtype).removeprefix("torch.")}


# transformers' Trainer with PEFT


def stock_model(spec: dict) -> nn.Module:
    """The same base, bidirectional, with adapters from PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    fields, dtype = spec["fields"], getattr(torch, spec["dtype"])
    kind = AutoModelForCausalLM if spec["kind"] == "mntp" else AutoModel
    if spec["model"] in MODELS:
        raw = dict(MODELS[spec["model"]])
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    else:
        config = AutoConfig.from_pretrained(spec["model"])
    config.is_causal = False  # on the config object: the only spelling that takes effect
    config.use_cache = False
    if spec["kind"] == "simcse":
        config.attention_dropout = fields.get("simcse_dropout", 0.3)
    if spec["model"] in MODELS:
        with torch.device(spec["device"]):
            model = kind.from_config(config, dtype=dtype, attn_implementation=spec["attention"])
    else:
        model = kind.from_pretrained(
            spec["model"], config=config, dtype=dtype, attn_implementation=spec["attention"]
        )
    rank = fields.get("lora_r", 16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=fields.get("lora_dropout", 0.05),
                      target_modules=targets)  # fmt: skip
    model = get_peft_model(model.to(spec["device"]), lora)  # adapters in fp32 by default
    if spec["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def collate(texts: list[dict]) -> dict[str, Tensor]:
    def padded(name: str, value: int) -> Tensor:
        rows = [text[name] for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids_BL = padded("ids", 0)
    lengths = torch.tensor([len(text["ids"]) for text in texts])
    mask_BL = (torch.arange(ids_BL.shape[1])[None] < lengths[:, None]).long()
    return {
        "input_ids": ids_BL, "attention_mask": mask_BL, "labels": padded("labels", IGNORED),
        "pooled": padded("pooled", 0),
    }  # fmt: skip


def stock(spec: dict) -> dict:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps = torch.load(spec["rows"])
    count, batch = spec["warm_up"] + spec["steps"], len(steps[0])
    model = stock_model(spec)
    watch, losses = Watch(spec), []

    class Told(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            watch.step(torch.stack(losses).sum())
            losses.clear()

    class Training(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **options):
            loss = super().training_step(*args, **options)
            losses.append(loss)
            return loss

        def compute_loss(self, model, inputs, return_outputs=False, **options):
            pooled_BL1 = inputs.pop("pooled").unsqueeze(-1)
            if spec["kind"] == "mntp":
                return super().compute_loss(model, inputs, return_outputs, **options)
            inputs.pop("labels")
            query_BD, doc_BD = (F.normalize(_pooled(model(**inputs), pooled_BL1)) for _ in range(2))
            cosine_BB = query_BD @ doc_BD.t()
            answers_B = torch.arange(len(cosine_BB), device=cosine_BB.device)
            return F.cross_entropy(SIMCSE_SCALE * cosine_BB, answers_B)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=count, per_device_train_batch_size=spec["micro"],
            gradient_accumulation_steps=batch // spec["micro"], learning_rate=5e-5,
            use_cpu=spec["device"] == "cpu", bf16=spec["autocast"], optim="adamw_torch_fused",
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            logging_nan_inf_filter=False, remove_unused_columns=False,
            dataloader_pin_memory=spec["device"] != "cpu",
        )  # fmt: skip
        rows = [text for n in range(count) for text in steps[n % len(steps)]]
        trainer = Training(
            model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Told()]
        )
        watch.begin()
        trainer.train()
    return watch.told()


def _pooled(states, pooled_BL1: Tensor) -> Tensor:
    return (states.last_hidden_state * pooled_BL1).sum(1, dtype=torch.float32) / pooled_BL1.sum(1)


# What is measured


class Watch:
    """Seconds and losses of steps after the warm-up; memory at rest, and the most in all steps."""

    def __init__(self, spec: dict):
        self.cuda, self.warm_up = spec["device"].startswith("cuda"), spec["warm_up"]
        self.seconds: list[float] = []
        self.losses: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.loaded = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is not of interest
            self.loaded = _peak_of_process()
        self.at = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.at)
        self.at = now

    def told(self) -> dict:
        peak = torch.cuda.max_memory_allocated() if self.cuda else _peak_of_process()
        return {
            "seconds": self.seconds[self.warm_up :],
            "losses": [float(loss) for loss in self.losses],
            "loaded_mb": self.loaded / 2**20,
            "peak_mb": peak / 2**20,
        }


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    main(sys.argv[1])
