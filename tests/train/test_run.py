"""Whole trainings of a tiny model: what they leave, who can read it, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast import LLM2Vec
from llm2vec_fast.model.checkpoint import WeightsError
from llm2vec_fast.train import checkpoint, load, run, train
from llm2vec_fast.train.checkpoint import CheckpointError
from llm2vec_fast.train.loop import LOG, RESOLVED, TrainingError
from llm2vec_fast.train.run import how_to_load, load_encoder

TEXTS = [f"{'a list of values, ' * (n % 5)}number {n} of a dictionary" for n in range(60)]
ASKED = ["the keys of a dict", "a list", "one two three numbers of many"]
OUTPUT = {
    "adapter_config.json", "adapter_model.safetensors", "llm2vec_config.json",
    "llm2vec_fast.json", LOG, RESOLVED, "checkpoint-4",
}  # fmt: skip
COMMON = {
    "torch_dtype": "float32", "device": "cpu", "lora_r": 4, "learning_rate": 0.01,
    "warmup_steps": 0, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4,
    "max_seq_length": 32, "tokens_per_batch": 64,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The machine's speed, which takes half a second to measure, is not what these tests are of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "matmul_rate", lambda *args: 1e9)
        yield


@pytest.fixture(scope="module")
def place(tiny_model, add_tokenizer, tmp_path_factory):
    """A directory with a model and data: base, texts.txt, pairs.jsonl."""
    place = tmp_path_factory.mktemp("run")
    model = add_tokenizer(tiny_model(place, "llama", causal_lm=True))
    model.rename(place / "base")
    (place / "texts.txt").write_text("\n".join([*TEXTS, "", "  "]) + "\n")
    rows = [
        {"query": TEXTS[n], "positive": f"answer {n}", "negative": f"no {n}", "instruction": "Ask"}
        for n in range(40)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def settle(place, tmp_path):
    """settle(kind, output="out", **fields) -> Config"""

    def make(kind, output="out", **fields):
        data = "pairs.jsonl" if kind == "supervised" else "texts.txt"
        given = {"model_name_or_path": str(place / "base"), "train_file": str(place / data)}
        given |= COMMON | {"output_dir": str(tmp_path / output)} | fields
        return load(kind, None, given)[0]

    return make


@pytest.fixture(scope="module")
def trained(place):
    """trained(kind) -> (output, summary, vectors of ASKED by the model in training at the end);
    SimCSE stands on the MNTP adapter.
    """
    made = {}

    def make(kind):
        if kind not in made:
            data = "pairs.jsonl" if kind == "supervised" else "texts.txt"
            given = {"model_name_or_path": str(place / "base"), "train_file": str(place / data)}
            given |= COMMON | {"output_dir": str(place / kind)}
            if kind == "simcse":
                given["peft_model_name_or_path"] = str(make("mntp")[0])
            seen = []

            def look(encoder):
                seen.append(encoder.encode(ASKED))
                return {"looked": 1.0}

            config, _ = load(kind, None, given)
            made[kind] = place / kind, train(config, look), seen[-1], config
        return made[kind]

    return make


def log_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / LOG).read_text().splitlines()]


def losses(output) -> list[float]:
    return [line["loss"] for line in log_of(output) if "loss" in line]


def encode(base, adapters):
    model = LLM2Vec.from_pretrained(base, adapters, dtype="float32", device="cpu")
    return model, model.encode(ASKED)


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_what_a_training_leaves(trained, place, kind):
    output, summary, _, config = trained(kind)
    assert {path.name for path in output.iterdir()} == OUTPUT
    log = log_of(output)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4, 4]
    assert (log[0]["looked"], log[-1]["looked"]) == (1.0, 1.0)
    assert summary.steps == 4 and summary.tokens == log[-1]["tokens"] > 4 * 4 * 3
    assert summary.loss == log[-2]["loss"]
    assert all(0 < line["grad_norm"] < 1e3 and line["matmul_share"] >= 0 for line in log[1:-1])
    again, ignored = load(kind, output / RESOLVED)
    assert again == config and ignored == []


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_the_adapter_read_back_is_the_model_that_was_trained(trained, place, kind):
    output, _, vectors, _ = trained(kind)
    below = [place / "mntp"] if kind == "simcse" else []
    model, found = encode(place / "base", [*below, output])
    torch.testing.assert_close(found, vectors, rtol=1e-4, atol=1e-5)
    _, before = encode(place / "base", below)
    assert (1 - F.cosine_similarity(before, found)).min() > 1e-4, "training changed nothing"
    # What is trained on is short; what is read later need not be.
    settings = {"pooling_mode": "mean", "max_length": 512, "doc_max_length": 400}
    assert model.settings | settings == model.settings
    assert model.settings["enable_bidirectional"] is True


def test_an_adapter_is_not_read_without_those_below_it(trained, place, tmp_path):
    """Its vectors would be wrong without a word. A base with them merged says so itself."""
    base, mntp, simcse = place / "base", *(trained(kind)[0] for kind in ("mntp", "simcse"))
    for adapters in ([simcse], [simcse, mntp], [trained("supervised")[0], simcse]):
        with pytest.raises(ValueError, match=r"on top of 1 other.* not merged before it: name all"):
            encode(base, adapters)
    whole, vectors = encode(base, [mntp, simcse])
    below, _ = encode(base, [mntp])
    below.save(tmp_path / "merged", merge_before_save=True)
    torch.testing.assert_close(encode(tmp_path / "merged", [simcse])[1], vectors)
    whole.save(tmp_path / "one")  # of both: nothing is below it any more
    torch.testing.assert_close(encode(base, [tmp_path / "one"])[1], vectors)


def peft_states(base, adapters, ids):
    """Hidden states of transformers and PEFT: all adapters but the last merged, as officially."""
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(base)
    config.is_causal = False
    model = AutoModel.from_pretrained(base, config=config, dtype=torch.float32)
    for adapter in adapters[:-1]:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model = peft.PeftModel.from_pretrained(model, str(adapters[-1])).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("kinds", [["mntp"], ["supervised"], ["mntp", "simcse"]])
def test_peft_reads_the_adapters(trained, place, kinds):
    """Equal vectors of equal adapters, alone and stacked."""
    adapters = [trained(kind)[0] for kind in kinds]
    model, vectors = encode(place / "base", adapters)
    for text, vector in zip(ASKED, vectors, strict=True):
        (tokens,) = model.tokenizer([text], [""])
        states = peft_states(place / "base", adapters, tokens.ids.tolist())
        expected = states[tokens.start : tokens.end].mean(0)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


def test_losses_are_the_same_whatever_is_logged_and_saved(trained, settle, tmp_path):
    """And without a look at the model in between."""
    expected = losses(trained("supervised")[0])
    train(settle("supervised", save_steps=1, save_total_limit=None, eval_steps=None))
    assert losses(tmp_path / "out") == expected
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 4


def test_the_whole_model(settle, place, tmp_path):
    """full_finetuning: a model of its own, that goes on bit for bit as well."""
    seen = []

    def look(encoder):
        seen.append(encoder.encode(ASKED))
        return {}

    fields = {"full_finetuning": True, "learning_rate": 1e-3}
    train(settle("simcse", "whole", **fields), look)
    train(settle("simcse", stop_after_n_steps=2, **fields))
    train(settle("simcse", **fields))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    _, found = encode(tmp_path / "out", [])
    torch.testing.assert_close(found, seen[-1], rtol=1e-5, atol=1e-5)
    _, before = encode(place / "base", [])
    assert (found - before).abs().max() > 1e-3


def test_held_out_text_is_looked_at(settle, tmp_path):
    train(settle("mntp", validation_split_percentage=20, eval_steps=2))
    figures = [(line["step"], line["eval_loss"]) for line in log_of(tmp_path / "out")
               if "eval_loss" in line]  # fmt: skip
    assert [step for step, _ in figures] == [0, 2, 4]
    assert figures[-1][1] < figures[0][1]


@pytest.mark.parametrize("kind", ["mntp", "simcse"])
def test_the_template_of_the_model_stays_with_the_adapter(settle, place, kind):
    """MNTP trains on plain text, but what is encoded later has the template of the model."""
    config = settle(kind, template="<|im_start|>{text}<|im_end|>", max_steps=1)
    train(config)
    model, _ = encode(place / "base", [config.output_dir])
    assert model.settings["template"] == config.template
    above = load_encoder(
        settle("simcse", "above", peft_model_name_or_path=config.output_dir), torch.device("cpu")
    )
    assert above.settings["template"] == config.template


def test_mntp_does_not_put_the_template_around_its_texts(settle, tmp_path):
    train(settle("mntp", "plain", max_steps=1))
    train(settle("mntp", "other", max_steps=1, template="<|im_start|>{text}<|im_end|>"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "other")


def test_an_adapter_is_read_from_any_directory(settle, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    train(settle("simcse", model_name_or_path="base", max_steps=1))
    monkeypatch.chdir(tmp_path)
    _, found = encode("out", [])
    torch.testing.assert_close(found, encode(place / "base", ["out"])[1])


def test_how_a_training_is_loaded(settle, trained, place):
    for kind in ("mntp", "simcse"):
        output, _, vectors, config = trained(kind)
        model = eval(how_to_load(config), {"LLM2Vec": LLM2Vec})
        torch.testing.assert_close(model.float().encode(ASKED), vectors, rtol=0.1, atol=0.1)
        assert model.sources.adapters[-1] == output
        assert len(model.sources.adapters) == 1 + (kind == "simcse")
    whole = settle("simcse", full_finetuning=True)
    assert how_to_load(whole) == f"LLM2Vec.from_pretrained({whole.output_dir!r})"


# --- going on, and not ---


def test_what_may_change_between_interruption_and_resume(settle, trained, tmp_path):
    free = {
        "stop_after_n_steps": 2, "logging_steps": 1, "save_steps": 1, "save_total_limit": 1,
        "disable_tqdm": True, "overwrite_output_dir": True,
    }  # fmt: skip
    train(settle("supervised", **free))
    train(settle("supervised"))
    assert losses(tmp_path / "out") == losses(trained("supervised")[0])


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("learning_rate", 0.02, "learning_rate: 0.01 there, 0.02 here"),
        ("max_steps", 5, "max_steps: 4 there, 5 here"),
        ("lora_r", 2, "lora_r: 4 there, 2 here"),
        ("tokens_per_batch", 65, "tokens_per_batch: 64 there, 65 here"),
        ("gradient_checkpointing", True, "gradient_checkpointing: False there"),
        ("simcse_dropout", 0.1, "simcse_dropout: 0.3 there"),
        ("max_train_samples", 30, "data: "),
    ],
)
def test_another_configuration_is_refused(settle, tmp_path, field, value, told):
    train(settle("simcse", stop_after_n_steps=1))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=told):
        train(settle("simcse", **{field: value}))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_other_data_and_another_model_are_refused(settle, place, tmp_path, tiny_model):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    train(settle("simcse", train_file=str(texts), stop_after_n_steps=1))
    texts.write_text("\n".join([*TEXTS[:-1], "another"]))
    with pytest.raises(CheckpointError, match=r"data: '\w+' there"):
        train(settle("simcse", train_file=str(texts)))
    texts.write_text("\n".join(TEXTS))
    config = settle("simcse", train_file=str(texts))
    adapter = settle("mntp", "below", max_steps=1)
    train(adapter)
    with pytest.raises(CheckpointError, match=r"model: '\w+' there"):
        train(replace(config, peft_model_name_or_path=(adapter.output_dir,)))
    moved = texts.rename(tmp_path / "moved.txt")  # known by what it holds, not by where it lies
    assert train(replace(config, train_file=(str(moved),))).steps == config.max_steps


# --- bad input ---


@pytest.mark.parametrize(
    ("kind", "text", "fields", "told"),
    [
        ("mntp", "", {}, "no texts"),
        ("mntp", "\n \n\t\n", {}, "no texts"),
        ("simcse", "", {}, "no texts"),
        ("mntp", "short\n", {}, r"fewer than one chunk of max_seq_length = 32.*line_by_line"),
        (
            "mntp",
            "a\n" * 3,
            {"line_by_line": True},
            "lower per_device_train_batch_size to at most 3",
        ),
        ("mntp", "a list of values\n" * 3, {"line_by_line": True}, "3 rows, fewer than one global"),
        ("simcse", "a list\n" * 3, {}, "lower per_device_train_batch_size to at most 3"),
        ("mntp", "a list of values\n" * 30, {"mask_token_type": "mask"}, "mask_token_type 'mask'"),
        ("simcse", "a list\n" * 9, {"torch_dtype": "float16"}, "float16"),
        ("simcse", "a list\n" * 9, {"peft_model_name_or_path": "/no/adapter"}, "/no/adapter"),
    ],
)
def test_bad_texts(settle, tmp_path, kind, text, fields, told):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        train(settle(kind, train_file=str(path), **fields))
    assert not (tmp_path / "out").exists(), "nothing is left of what never began"


def test_a_template_without_room_for_text(settle, tmp_path):
    with pytest.raises(ValueError, match=r"no room.*max_length = 4"):
        train(settle("simcse", max_seq_length=4, template="a long way to go {text}"))
    assert checkpoint.found(tmp_path / "out") == []


def test_one_token_texts_train(settle, tmp_path):
    """Beside their beginning-of-sequence token: one to predict, one to pool."""
    path = tmp_path / "t.txt"
    path.write_text("a\n" * 8)
    train(settle("mntp", "m", train_file=str(path), line_by_line=True, mlm_probability=1.0))
    train(settle("simcse", "s", train_file=str(path)))
    assert all(loss > 0 for loss in [*losses(tmp_path / "m"), *losses(tmp_path / "s")])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", "no examples"),
        ('{"query": "q"}\n', r"bad.jsonl, row 0.*positive"),
        ('{"query": "q", "positive": "p", "negative": ["n"]}\n{"query": "q", "positive": "p"}\n',
         "row 1: 0 negatives"),
        ('{"query": "q", "positive": ""}\n', "row 0: a positive is empty"),
        ("not json\n", "row 0: not valid JSON"),
    ],
)  # fmt: skip
def test_bad_pairs(settle, tmp_path, rows, told):
    path = tmp_path / "bad.jsonl"
    path.write_text(rows)
    with pytest.raises(ValueError, match=told):
        train(settle("supervised", train_file=str(path)))
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_said(settle, tmp_path, capsys):
    rows = [{"query": f"q {n}", "positive": f"p {n}", "task": "big"} for n in range(8)]
    rows += [{"query": "q", "positive": "p", "task": "small"}]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(settle("supervised", train_file=str(path), max_steps=1))
    assert "small" in capsys.readouterr().err
    train(settle("simcse", "s", max_steps=1))
    assert "2 empty texts are left out" in capsys.readouterr().err


def test_a_broken_adapter_in_the_output_is_no_obstacle(settle, tmp_path):
    """The output's own files are written, never read; the stack below is read."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{")
    train(settle("simcse", max_steps=1))
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="not a valid safetensors"):
        train(settle("simcse", "next", peft_model_name_or_path=str(tmp_path / "out")))


@pytest.mark.parametrize("kind", ["simcse", "mntp"])
def test_an_output_that_is_a_model_being_read(settle, place, tmp_path, kind):
    """An adapter beside the base's weights would be part of the base from then on."""
    base = place / "base"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(ValueError, match="is a model that this training reads"):
        train(settle(kind, str(base / "." / ""), max_steps=1))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    below = settle("mntp", "below", max_steps=1)
    train(below)
    with pytest.raises(ValueError, match="is a model that this training reads"):
        train(settle(kind, "below", peft_model_name_or_path=below.output_dir, max_steps=1))


def test_an_output_that_holds_another_model(settle, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "out")
    with pytest.raises(ValueError, match="holds a whole model"):
        train(settle("simcse", max_steps=1))
    with pytest.raises(ValueError, match="holds a whole model"):
        train(settle("simcse", full_finetuning=True, max_steps=1))
    assert not (tmp_path / "out" / RESOLVED).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train(settle("simcse", "file"))


def test_an_adapter_does_not_join_the_whole_model_of_an_earlier_run(settle, tmp_path):
    train(settle("simcse", full_finetuning=True, max_steps=1))
    train(settle("simcse", full_finetuning=True, max_steps=1))  # its own is no obstacle
    with pytest.raises(ValueError, match="holds a whole model"):
        train(settle("simcse", overwrite_output_dir=True, max_steps=1))


def test_a_single_text_cannot_be_split(settle, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a list of values\n")
    with pytest.raises(ValueError, match="sets the only training text aside"):
        train(settle("mntp", train_file=str(path), validation_split_percentage=10))


def test_an_eval_file_that_nobody_would_read(settle, tmp_path):
    with pytest.raises(ValueError, match="evaluate=lambda encoder"):
        train(settle("simcse", eval_file="sts.csv"))
    assert not (tmp_path / "out").exists()


# --- losses that are not finite; disks ---


def test_a_learning_rate_that_blows_up(settle, tmp_path):
    config = settle(
        "simcse", learning_rate=1e30, max_grad_norm=0, save_steps=1, lr_scheduler_type="constant"
    )
    with pytest.raises(TrainingError) as told:
        train(config)
    (kept,) = checkpoint.found(tmp_path / "out")
    assert f"The last good checkpoint is {kept}" in str(told.value)
    assert "learning_rate" in str(told.value) and "rows" in str(told.value)
    step = int(kept.name.split("-")[1])
    assert f"step {step + 1}: " in str(told.value)
    _, tensors = checkpoint.read(kept)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert (kept / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("size", [0, 3000, 40_000])
def test_a_full_disk(
    room_for, settle, trained, tmp_path, capsys, size
):  # capsys: stderr is no file
    """At the log, the adapter, the optimiser: it is told where, and the same command goes on."""
    train(settle("supervised", save_steps=1, stop_after_n_steps=2))
    out = tmp_path / "out"
    kept = {p: p.read_bytes() for p in out.glob("checkpoint-*/*")}
    with room_for(size), pytest.raises(CheckpointError, match="could not be written"):
        train(settle("supervised", save_steps=1))
    assert {p: p.read_bytes() for p in out.glob("checkpoint-*/*")} == kept
    train(settle("supervised", save_steps=1))
    assert losses(out) == losses(trained("supervised")[0])
    assert not list(out.glob("checkpoint-*.partial"))


def test_the_speed_of_the_machine_is_measured(settle, tmp_path, monkeypatch):
    """Of this model's shapes, on this device; without it no share is logged."""
    asked = []

    def rate(config, dtype, device, seconds):
        asked.append((config.hidden_size, dtype, torch.device(device).type))
        return 0.0

    monkeypatch.setattr(run, "matmul_rate", rate)
    train(settle("simcse", max_steps=1))
    assert asked == [(48, torch.float32, "cpu")]
    assert "matmul_share" not in log_of(tmp_path / "out")[-1]
