"""Supervised training: instructions, tasks, hard negatives, and the loss of the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast.train.config import load
from llm2vec_fast.train.pairs import Example
from llm2vec_fast.train.ranks import ALONE, Ranks
from llm2vec_fast.train.run import load_encoder
from llm2vec_fast.train.supervised import Supervised

CPU = torch.device("cpu")


def examples(count: int, negatives: int = 0, task: str = "", **more) -> list[Example]:
    return [
        Example(
            f"what is {task} {n}",
            f"{task} {n} is a list of values",
            tuple(f"no {task} {n} {m}" for m in range(negatives)),
            task,
            **more,
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def make(tiny_model, add_tokenizer, tmp_path_factory):
    """make(examples, ranks=ALONE, **config) -> Supervised"""
    base = add_tokenizer(tiny_model(tmp_path_factory.mktemp("supervised"), "llama"))
    encoder = None

    def build(rows, ranks=ALONE, **values) -> Supervised:
        nonlocal encoder
        given = {"model_name_or_path": str(base), "output_dir": "o", "train_file": "t"}
        given |= {"torch_dtype": "float32", "per_device_train_batch_size": 4}
        given |= {"tokens_per_batch": 4096, "lora_dropout": 0.0}
        config, _ = load("supervised", None, given | values)
        encoder = encoder or load_encoder(config, CPU)
        return Supervised(encoder, rows, config, ranks)

    return build


def texts_of(objective, batch) -> list[tuple[str, str]]:
    """(all that the model sees of each text, all that is pooled of it), in the batch's order."""
    raw = objective.encoder.tokenizer.raw
    seen = []
    for chunk in batch.chunks:
        ids, starts = chunk.batch.ids.tolist(), chunk.batch.cu_seqlens.tolist()
        for (start, end), first, last in zip(
            chunk.batch.spans.tolist(), starts, starts[1:], strict=False
        ):
            seen.append((raw.decode(ids[first:last]), raw.decode(ids[start:end])))
    return [seen[place] for place in batch.order.tolist()]


def test_what_stands_where(make):
    """Queries, answers, first negatives, second negatives; instructions are seen, not pooled."""
    rows = examples(8, 2, "sum", query_instruction="Find it;", doc_instruction="Given:")
    objective = make(rows, tokens_per_batch=64)
    work = objective.prepare(0)
    (batch,) = work.parts
    chosen = [rows[i] for i in work.rows]
    columns = [
        [("Find it; " + e.query, e.query) for e in chosen],
        [("Given: " + e.positive, e.positive) for e in chosen],
        [("Given: " + e.negatives[0], e.negatives[0]) for e in chosen],
        [("Given: " + e.negatives[1], e.negatives[1]) for e in chosen],
    ]
    expected = [pair for column in columns for pair in column]
    assert [(a.strip(), b.strip()) for a, b in texts_of(objective, batch)] == expected
    assert batch.queries == 4 and len(batch.chunks) > 1


def test_the_configuration_can_say_other_instructions(make):
    rows = examples(4, 0, "sum", query_instruction="Find it;", doc_instruction="Given:")
    objective = make(rows, query_instruction="Search:", doc_instruction="")
    seen = [pair[0].strip() for pair in texts_of(objective, objective.prepare(0).parts[0])]
    assert all(text.startswith("Search: what") for text in seen[:4])
    assert all(text.startswith("sum ") for text in seen[4:])


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_the_loss_is_that_of_encoded_texts(make, negatives):
    """CE(50 * cos(q, [p; n]), arange), with the vectors that `encode` gives."""
    rows = examples(8, negatives, "sum", query_instruction="Find it;")
    objective = make(rows, tokens_per_batch=64)
    work = objective.prepare(1)
    chosen = [rows[i] for i in work.rows]
    docs = [e.positive for e in chosen]
    docs += [e.negatives[i] for i in range(negatives) for e in chosen]
    encode = objective.encoder.encode
    queries = encode([[e.query_instruction, e.query] for e in chosen])
    scores = F.normalize(queries, dim=1) @ F.normalize(encode(docs), dim=1).T
    assert scores.shape == (4, 4 * (1 + negatives))
    expected = F.cross_entropy(50 * scores, torch.arange(4))
    assert objective.backward(work).item() == pytest.approx(expected.item(), rel=1e-4)


def test_batches_hold_one_task(make):
    rows = examples(9, 1, "sum") + examples(8, 2, "max") + examples(4, 0, "min")
    objective = make(rows, ranks=Ranks(1, 2), per_device_train_batch_size=2)
    seen = set()
    for step in range(2 * objective.steps_per_epoch):
        work = objective.prepare(step)
        (task,) = {rows[i].task for i in work.rows}
        seen.add(task)
        count = len(rows[work.rows[0]].negatives)
        assert len(work.parts[0].order) == 2 * (2 + count)
    assert seen == {"sum", "max", "min"}


def test_tasks_that_fill_no_batch_are_named(make):
    rows = examples(8, 0, "sum") + examples(3, 0, "rare") + examples(2, 0, "rarer")
    assert make(rows).too_small == ["rare", "rarer"]
    assert make(rows, homogeneous_batches=False).too_small == []


def test_mixed_batches_need_equal_numbers_of_negatives(make):
    rows = examples(4, 1, "sum") + examples(4, 2, "max")
    with pytest.raises(ValueError, match=r"'sum' has 1 negatives.* 'max' has 2.*at most 1"):
        make(rows, homogeneous_batches=False)
    mixed = make(examples(4, 1, "sum") + examples(4, 1, "max"), homogeneous_batches=False)
    tasks = [{mixed.examples[i].task for i in mixed.prepare(step).rows} for step in range(6)]
    assert {"sum", "max"} in tasks


def test_equal_texts_are_no_negatives_where_asked(make):
    """Two rows of one query: their answers are not negatives of each other."""
    rows = [Example("q", f"answer {n}") for n in range(2)]
    objective = make(rows, per_device_train_batch_size=2, mask_duplicates=True)
    assert objective.backward(objective.prepare(0)).item() == pytest.approx(0.0, abs=1e-6)
    plain = make(rows, per_device_train_batch_size=2)
    assert plain.backward(plain.prepare(0)).item() > 0.01


def test_the_fingerprint_is_that_of_all_fields(make):
    one = examples(4, 1, "sum")
    others = [
        one[::-1],
        [Example(e.query, e.positive, e.negatives, "other") for e in one],
        [Example(e.query, e.positive, (), e.task) for e in one],
        [Example(e.query, e.positive, e.negatives, e.task, "Find it;") for e in one],
    ]
    assert len({make(rows).fingerprint for rows in (one, *others)}) == 5
    assert make(list(one)).fingerprint == make(one).fingerprint


def test_only_the_adapters_inputs_are_dropped(make):
    objective = make(examples(4, 1, "sum"), lora_dropout=0.1)
    works = [objective.prepare(step) for step in range(3)]
    drops = [chunk.drop for work in works for chunk in work.parts[0].chunks]
    assert {(drop.attention, drop.lora) for drop in drops} == {(0.0, 0.1)}
    assert len({drop.seed for drop in drops}) == len(drops)
    assert all(np.array_equal(w.rows, objective.prepare(w.step).rows) for w in works)
