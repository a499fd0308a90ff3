"""MNTP against transformers: loss, gradients of every adapter, masking, twenty steps of Trainer."""

from __future__ import annotations

import copy
import json
import math
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm2vec_fast.model import adapt, weights
from llm2vec_fast.text import TextTokenizer
from llm2vec_fast.train import load, train
from llm2vec_fast.train.mntp import Masking, Mntp, find_mask_id
from llm2vec_fast.train.optimizer import Optimizer
from llm2vec_fast.train.ranks import Ranks
from llm2vec_fast.train.run import load_encoder, make_objective

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
WORDS = "a list of whole numbers that the object gives back to its caller when it is asked".split()
BY_LINE = {"line_by_line": True, "max_seq_length": 96}
BOS, BLANK, CPU = 0, "_", torch.device("cpu")


def lines(count: int, seed: int = 0) -> str:
    """Texts of 1 to 24 words."""
    noise = np.random.default_rng(seed)
    return "\n".join(" ".join(noise.choice(WORDS, noise.integers(1, 25))) for _ in range(count))


@pytest.fixture
def config(tiny_model, add_tokenizer, tmp_path):
    """config(family="llama", n_texts=24, model={}, **fields) of a training on fresh files."""

    def make(family="llama", n_texts=24, model=None, **fields):
        base = add_tokenizer(tiny_model(tmp_path, family, causal_lm=True, **(model or {})))
        texts = tmp_path / "texts.txt"
        texts.write_text(lines(n_texts), encoding="utf-8")
        told = {
            "model_name_or_path": str(base),
            "train_file": [str(texts)],
            "output_dir": str(tmp_path / "out"),
            "torch_dtype": "float32",
            "device": "cpu",
            "lora_dropout": 0.0,
            "lora_r": 4,
            "max_seq_length": 32,
            "per_device_train_batch_size": 6,
        }
        return load("mntp", None, told | fields)[0]

    return make


def begin(config, ranks: Ranks | None = None) -> Mntp:
    """A training whose adapters are no longer fresh: B is not zero, so that A has gradients."""
    encoder = load_encoder(config, CPU)
    noise = torch.Generator().manual_seed(1)
    for _, _, b_OR in adapt.factors(encoder.model):
        b_OR.data.copy_(0.2 * torch.randn(b_OR.shape, generator=noise))
    objective = make_objective(config, encoder, ranks or Ranks())
    assert isinstance(objective, Mntp)
    return objective


def gradients(objective: Mntp) -> dict[str, torch.Tensor]:
    """{PEFT's name: gradient} of the adapters; taken, so that the next ones start at zero."""
    shadow = copy.deepcopy(objective.encoder.model)
    for own, copied in zip(objective.encoder.model.parameters(), shadow.parameters(), strict=True):
        assert (own.grad is not None) == own.requires_grad
        if own.grad is not None:
            copied.data, own.grad = own.grad, None
    return named(shadow)


def named(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, a_RD, b_OR in adapt.factors(model):
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = a_RD.detach(), b_OR.detach()
    return found


def oracle(config, adapters: dict[str, torch.Tensor]):
    """transformers' bidirectional causal LM with PEFT's LoRA, holding the same A and B."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.from_pretrained(config.model_name_or_path)
    theirs.is_causal = False
    theirs.sliding_window = None  # LLM2Vec drops the window together with the causal mask
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, config=theirs)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(config.lora_target_modules),
    )
    model = get_peft_model(model, lora)
    factors = by_name(model)
    assert factors.keys() == adapters.keys()
    for name, weight in factors.items():
        weight.data.copy_(adapters[name])
    return model


def by_name(model) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): weight
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


def as_padded(parts) -> dict[str, torch.Tensor]:
    """The batch as transformers takes it; a label stands at the masked token, not before it."""
    rows = []
    for part in parts:
        labels = torch.full_like(part.batch.ids, -100, dtype=torch.long)
        labels[part.rows_M + 1] = part.targets_M
        lengths = part.batch.lengths
        rows += zip(part.batch.ids.split(lengths), labels.split(lengths), strict=True)

    def padded(which: int, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[which] for row in rows], True, value)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in rows], True)
    return {"input_ids": padded(0, 1).long(), "attention_mask": mask, "labels": padded(1, -100)}


def by_transformers(objective: Mntp, *works) -> tuple[float, dict[str, torch.Tensor]]:
    model = oracle(objective.config, named(objective.encoder.model))
    loss = model(**as_padded([part for work in works for part in work.parts])).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in by_name(model).items()}


def assert_close(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.abs().max() > 0, name
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name


MODELS = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_transformers(config, name):
    family, model = MODELS[name]
    objective = begin(config(family, model=model, **BY_LINE, tokens_per_batch=120))
    work = objective.prepare(0)
    assert len(work.parts) > 1 and len({n for p in work.parts for n in p.batch.lengths}) > 2
    loss, want = by_transformers(objective, work)
    assert objective.backward(work).item() == pytest.approx(loss, rel=1e-5)
    assert_close(gradients(objective), want)


def test_the_cut_into_chunks_and_recompute_change_neither_masks_nor_gradients(config):
    settled = config(**BY_LINE, gradient_accumulation_steps=2)
    objective = begin(settled)
    rows = np.concatenate([objective.order.rows(2), objective.order.rows(3)])
    sizes, losses, masked, found = [], [], [], []
    for budget, recompute in ((1, False), (110, True), (250, False), (10_000, True)):
        objective.budget = budget
        object.__setattr__(objective.config, "gradient_checkpointing", recompute)
        work = objective.prepare(1)
        assert (work.rows == rows).all() and work.tokens == sum(
            part.batch.n_tokens for part in work.parts
        )
        sizes.append(len(work.parts))
        padded = as_padded(work.parts)  # sorted by length whatever the budget is
        masked.append(torch.stack([padded["input_ids"], padded["labels"]]))
        losses.append(objective.backward(work).item())
        found.append(gradients(objective))
    assert sizes[0] == len(rows) > sizes[1] > sizes[2] > sizes[3] == 1
    assert all(torch.equal(one, masked[0]) for one in masked)
    loss, want = by_transformers(objective, work)
    for got, grads in zip(losses, found, strict=True):
        assert got == pytest.approx(loss, rel=1e-5)
        assert_close(grads, want)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_training_the_whole_model_is_that_of_transformers(config, name):
    """Ours with its own optimizer, theirs with torch's; a head that is not tied stays as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settled = config(model=MODELS[name][1], full_finetuning=True, weight_decay=0.1)
    encoder = load_encoder(settled, CPU)
    optimizer = Optimizer(encoder.model.named_parameters(), learning_rate=1e-3, weight_decay=0.1)
    objective = make_objective(settled, encoder, Ranks())
    theirs = AutoConfig.from_pretrained(settled.model_name_or_path)
    theirs.is_causal = False
    model = AutoModelForCausalLM.from_pretrained(settled.model_name_or_path, config=theirs)
    if name == "untied":
        model.lm_head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(3):
        work = objective.prepare(step)
        optimizer.clear()
        loss = objective.backward(work).item()
        norm = optimizer.step(Ranks()).item()
        adamw.zero_grad()
        want = model(**as_padded(work.parts)).loss
        want.backward()
        assert loss == pytest.approx(want.item(), rel=1e-5)
        clipped = torch.nn.utils.clip_grad_norm_(trained, settled.max_grad_norm)
        assert norm == pytest.approx(clipped.item(), rel=1e-5)
        adamw.step()
    want = {n: p.detach() for n, p in model.model.named_parameters()}
    # Adam divides gradients that are next to nothing by themselves: a few elements stray.
    assert_close(dict(weights.unfused(encoder.model)), want, 1e-3)


def test_gradients_of_a_whole_model_in_bf16(config):
    """Embeddings that are the head too, many chunks, recomputed: each gradient is added once."""
    found = []
    for dtype in ("float32", "bfloat16"):
        settled = config(
            model=MODELS["tied"][1],
            full_finetuning=True,
            torch_dtype=dtype,
            tokens_per_batch=64,
            gradient_checkpointing=True,
        )
        encoder = load_encoder(settled, CPU)
        optimizer = Optimizer(encoder.model.named_parameters(), learning_rate=1e-3)
        objective = make_objective(settled, encoder, Ranks())
        work = objective.prepare(0)
        assert len(work.parts) == 3
        objective.backward(work)
        grads = torch.cat([vector.grad for vector in optimizer.vectors])
        sizes = [(told, math.prod(shape)) for told, shape in optimizer.layout()]
        split = grads.split([size for _, size in sizes])
        found.append(dict(zip([told for told, _ in sizes], split, strict=True)))
    assert_close(found[1], found[0], 0.1)
    embed = [grads["embed.weight"] for grads in found]
    assert ((embed[1] - embed[0]).norm() / embed[0].norm()).item() < 0.03


def test_ranks_average_to_the_mean_over_all_their_masked_tokens(config):
    class Rank(Ranks):
        def mean_(self, x):
            return x.fill_(share)

    settled = config(**BY_LINE)
    objectives = [begin(settled, Rank(rank, 2)) for rank in range(2)]
    works = [objective.prepare(0) for objective in objectives]
    assert not set(works[0].rows) & set(works[1].rows)
    counts = [sum(len(part.rows_M) for part in work.parts) for work in works]
    share = sum(counts) / 2
    assert counts[0] != counts[1]
    pairs = list(zip(objectives, works, strict=True))
    losses = [objective.backward(work).item() for objective, work in pairs]
    both = [gradients(objective) for objective in objectives]
    loss, want = by_transformers(objectives[0], *works)
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-5)
    assert_close({name: (both[0][name] + both[1][name]) / 2 for name in want}, want)


def test_without_a_masked_token_the_loss_is_zero(config):
    objective = begin(config(mlm_probability=1e-12))
    work = objective.prepare(0)
    assert objective.backward(work).item() == 0.0
    assert all((g == 0).all() for g in gradients(objective).values())


def test_everything_masked_leaves_out_specials_and_first_places(config):
    objective = begin(config(mlm_probability=1.0, data_collator_type="all_mask"))
    work = objective.prepare(0)
    blank = objective.encoder.tokenizer.raw.token_to_id(BLANK)
    (part,) = work.parts  # equal lengths: chunks lie in the order of the rows
    ids, specials = objective.chunks.rows(work.rows)
    true_T, special_T = torch.tensor(np.concatenate(ids)), torch.tensor(np.concatenate(specials))
    first_T = torch.zeros_like(special_T)
    first_T[part.batch.cu_seqlens[:-1].long()] = True
    assert (special_T & ~first_T).any() and (first_T & ~special_T).any()
    assert torch.equal(part.batch.ids == blank, ~special_T)  # first places are masked all the same
    assert torch.equal(part.batch.ids[special_T], true_T[special_T])
    assert (true_T[special_T] == BOS).all()
    assert torch.equal(part.rows_M + 1, (~special_T & ~first_T).nonzero()[:, 0])
    assert torch.equal(part.targets_M, true_T[part.rows_M + 1].long())

    padded = as_padded(work.parts)
    padded["labels"] = torch.where(~special_T, true_T, -100).view(padded["labels"].shape).long()
    assert (padded["labels"][:, 0] != -100).any()  # dropped by transformers' shift as well
    model = oracle(objective.config, named(objective.encoder.model))
    want = model(**padded).loss.item()
    assert objective.backward(work).item() == pytest.approx(want, rel=1e-5)


def test_a_step_is_a_function_of_seed_step_and_rank(config):
    def drawn(step, rank=0, seed=42):
        settled = config(lora_dropout=0.1, per_device_train_batch_size=2, seed=seed)
        (part,) = begin(settled, Ranks(rank, 2)).prepare(step).parts
        return (part.batch.ids.tolist(), part.rows_M.tolist(), part.drop)

    first, *others = seen = [drawn(3), drawn(4), drawn(3, rank=1), drawn(3, seed=43)]
    assert first == drawn(3) and first not in others
    assert len({drop.seed for *_, drop in seen}) == 4
    assert first[2].lora == 0.1 and first[2].attention == 0.0
    chunks = begin(config(lora_dropout=0.1, tokens_per_batch=32)).prepare(0).parts
    assert len({part.drop.seed for part in chunks}) == len(chunks) == 6


def test_evaluation_is_the_mean_loss_of_held_out_chunks(config, tmp_path):
    aside = tmp_path / "aside.txt"
    aside.write_text(lines(9, seed=5), encoding="utf-8")
    objective = begin(
        config(validation_file=[str(aside)], lora_dropout=0.5, tokens_per_batch=64, lora_r=2)
    )
    first, again = objective.evaluate(), objective.evaluate()
    assert first == again and first.keys() == {"eval_loss"}
    rows = np.arange(len(objective.held_out))
    parts = objective._parts(objective.held_out, rows, (42, 2), objective.prepare(0).parts[0].drop)
    assert len(parts) > 1
    want, _ = by_transformers(objective, types.SimpleNamespace(parts=parts))
    assert first["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert begin(config()).evaluate() == {}


KINDS = {"default": (0.8, 0.1), "all_mask": (1.0, 0.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_masking_has_the_statistics_of_transformers(tiny_tokenizer_dir, kind):
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir, mask_token=BLANK)
    to_mask, to_random = KINDS[kind]
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.2, mask_replace_prob=to_mask, random_replace_prob=to_random
    )
    noise, vocab = np.random.default_rng(3), len(tokenizer)
    count = 400_000
    ids_T = noise.integers(5, vocab, count).astype(np.int32)
    ids_T[ids_T == tokenizer.mask_token_id] += 1
    special_T = noise.random(count) < 0.1
    masking = Masking(0.2, kind, tokenizer.mask_token_id, vocab)
    got_T, chosen_T = masking(ids_T, special_T, np.random.default_rng(1))

    torch.manual_seed(0)
    true_1T = torch.tensor(ids_T, dtype=torch.long)[None]
    theirs_1T, labels_1T = collator.torch_mask_tokens(
        true_1T.clone(), special_tokens_mask=torch.tensor(special_T)[None]
    )
    theirs_T, picked_T = theirs_1T[0].numpy(), (labels_1T[0] != -100).numpy()

    def shares(changed_T, chosen_T):
        assert not (chosen_T & special_T).any()
        assert (changed_T[~chosen_T] == ids_T[~chosen_T]).all()
        new_T, old_T = changed_T[chosen_T], ids_T[chosen_T]
        masked_T, same_T = new_T == masking.mask_id, new_T == old_T
        drawn_T = new_T[~masked_T & ~same_T]
        spread = np.bincount(drawn_T, minlength=vocab) / len(new_T) * vocab
        return (chosen_T.mean(), masked_T.mean(), same_T.mean()), spread

    (ours, our_spread), (want, their_spread) = shares(got_T, chosen_T), shares(theirs_T, picked_T)
    size = chosen_T.sum()
    for mine, theirs, total in zip(ours, want, (count, size, size), strict=True):
        deviation = (2 * max(theirs * (1 - theirs), 1 / total) / total) ** 0.5
        assert abs(mine - theirs) <= 4 * deviation
    # Random tokens come from all of the vocabulary alike.
    assert (our_spread > 0).sum() == (their_spread > 0).sum() == (vocab - 1 if to_random else 0)
    assert np.abs(our_spread - their_spread).max() <= 0.1


def test_mask_tokens(tiny_tokenizer_dir, config):
    tokenizer = TextTokenizer(tiny_tokenizer_dir)
    assert find_mask_id(tokenizer, "blank") == tokenizer.raw.token_to_id("_")
    assert find_mask_id(tokenizer, "eos") == 1
    with pytest.raises(ValueError, match="the token '<mask>'; set mask_token_type to blank or eos"):
        find_mask_id(tokenizer, "mask")
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="an end token; set mask_token_type to blank or mask"):
        find_mask_id(tokenizer, "eos")
    tokenizer.raw.add_tokens(["<mask>"])
    added = find_mask_id(tokenizer, "mask")
    assert added == tokenizer.raw.get_vocab_size() - 1

    settled = config(mask_token_type="mask")
    encoder = load_encoder(settled, CPU)
    encoder.tokenizer.raw.add_tokens([f"<{n}>" for n in range(300)] + ["<mask>"])
    with pytest.raises(ValueError, match="is beyond the model's vocabulary"):
        make_objective(settled, encoder, Ranks())


STEPS = 20


def test_twenty_steps_are_those_of_trainer(config, monkeypatch, tmp_path):
    monkeypatch.setattr("llm2vec_fast.train.run.matmul_rate", lambda *_: 1.0)
    settled = config(
        n_texts=200,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        tokens_per_batch=96,  # cuts a step into three chunks, across the batches that Trainer takes
        max_steps=STEPS,
        warmup_steps=4,
        learning_rate=5e-3,
        weight_decay=0.1,
        max_grad_norm=1.3,
        logging_steps=1,
        save_strategy="no",
    )
    encoder = load_encoder(settled, CPU)
    objective = make_objective(settled, encoder, Ranks())
    batches = []
    for step in range(STEPS):
        padded = as_padded(objective.prepare(step).parts)
        halves = zip(*(value.split(4) for value in padded.values()), strict=True)
        batches += [dict(zip(padded, half, strict=True)) for half in halves]
    model = oracle(settled, named(encoder.model))
    losses, norms, factors = by_trainer(settled, model, batches, tmp_path)

    assert train(settled).steps == STEPS
    log = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in log]
    assert min(norms) < settled.max_grad_norm < max(norms)  # some steps were clipped, some not
    assert losses[-1] < losses[0]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in log] == pytest.approx(norms, rel=1e-5)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    got = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): weight
        for name, weight in saved.items()
    }
    assert_close(got, factors, 1e-3)


def by_trainer(config, model, batches, tmp_path):
    """Losses, norms of the gradients and final adapters of transformers' Trainer."""
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    losses = []

    class Ours(Trainer):
        def get_train_dataloader(self):
            return DataLoader(batches, batch_size=None)

        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))  # the log rounds them
            return losses[-1]

    names = ("max_steps", "warmup_steps", "learning_rate", "weight_decay", "max_grad_norm")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        use_cpu=True,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **{name: getattr(config, name) for name in names},
    )
    trainer = Ours(model=model, args=arguments, train_dataset=batches)
    trainer.train()
    told = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(told) == STEPS and len(losses) == 2 * STEPS
    sums = [(losses[2 * n] + losses[2 * n + 1]).item() for n in range(STEPS)]
    factors = {name: weight.detach() for name, weight in by_name(model).items()}
    return sums, [float(line["grad_norm"]) for line in told], factors
