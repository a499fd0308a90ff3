"""The recipe of LLM2Vec on SmolLM2-135M, from text to the table of its effect, on any machine.

    python -m benchmarks.recipe data   --shared DIR --work DIR    # the texts to train on
    python -m benchmarks.recipe mntp   --work DIR                 # hours on a CPU; resumes
    python -m benchmarks.recipe simcse --work DIR                 # on top of it; resumes
    python -m benchmarks.recipe table  --shared DIR --work DIR    # STS-B, CoNLL-2000, UNER
    python -m benchmarks.recipe ship   --work DIR                 # the adapters as package data

Texts: WikiText-2 (valid and test), the State of the Union addresses, and the docstrings of this
Python's standard library; nothing else. Further words after `mntp` and `simcse` are fields of the
training, as `--max_steps 100`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.measure import write_rows
from llm2vec_fast.demo import docstrings, ensure_model

HERE = Path(__file__).parent
ADAPTERS = HERE.parent / "llm2vec_fast/adapters"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = ("wikitext-2/valid.txt", "wikitext-2/test.txt", "state-union/addresses.txt")
HELD_OUT = 150  # texts: every n-th is looked at and not trained on
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
WORDS = range(6, 61)  # of a sentence for SimCSE


def plain(line: str) -> str:
    """A line of WikiText or of an address as people write it."""
    for mark in ("-", ",", "."):
        line = line.replace(f" @{mark}@ ", mark)
    line = re.sub(r" ([,.;:!?)\]%]|'s\b|'t\b|n't\b)", r"\1", line)
    line = re.sub(r"([(\[$£]) ", r"\1", line)
    line = re.sub(r'" (.*?) "', r'"\1"', line)
    return " ".join(line.split())


def sentences(text: str) -> list[str]:
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def paragraphs(shared: Path) -> Iterator[str]:
    """Paragraphs of prose; sentences with a lost word (<unk>) and headings are left out."""
    for name in SOURCES:
        for line in (shared / name).read_text(encoding="utf-8").splitlines():
            if not line.strip() or line.strip().startswith("= "):
                continue
            kept = [part for part in sentences(plain(line)) if "<unk>" not in part]
            if kept and len(" ".join(kept)) >= 40:
                yield " ".join(kept)
    for _, text in docstrings():
        yield text


def make_data(shared: Path, work: Path) -> None:
    """mntp.jsonl, held_out.jsonl and simcse.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    texts = list(dict.fromkeys(paragraphs(shared)))
    step = len(texts) // HELD_OUT
    held_out = texts[::step][:HELD_OUT]
    aside = set(held_out)
    trained = [text for text in texts if text not in aside]
    found = dict.fromkeys(
        " ".join(part.split())
        for text in trained
        for block in text.split("\n\n")  # docstrings: code and tables are no sentences
        if ">>>" not in block and "   " not in block
        for part in sentences(block)
    )
    pairs = [text for text in found if len(text.split()) in WORDS]
    for name, rows in (("mntp", trained), ("held_out", held_out), ("simcse", pairs)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in rows)
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(rows)} texts, {sum(map(len, rows))} characters")


def run_training(kind: str, shared: Path, work: Path, fields: list[str]) -> None:
    """`llm2vec-fast train` in a process of its own; killed, the same command resumes."""
    given = {
        "model_name_or_path": ensure_model(),
        "train_file": work / f"{kind}.jsonl",
        "output_dir": work / kind,
        "eval_file": shared / "stsb/stsb-en-dev.csv",
    }
    if kind == "mntp":
        given |= {"validation_file": work / "held_out.jsonl", "eval_steps": 500}
    else:
        given |= {"peft_model_name_or_path": work / "mntp", "eval_steps": 60}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config = HERE.parent / f"examples/train/smollm2_{kind}.json"
    command = [sys.executable, "-m", "llm2vec_fast", "train", kind, str(config)]
    subprocess.run([*command, *words, *fields], check=True)


def models(work: Path) -> dict[str, str]:
    """{row of the table: model as `llm2vec-fast eval` takes it}."""
    base, mntp, simcse = ensure_model(), work / "mntp", work / "simcse"
    bi_mntp = f"base={base},adapter={mntp}"
    rows = {
        "causal, mean": f"base={base},causal=true,pooling_mode=mean",
        "causal, weighted mean": f"base={base},causal=true,pooling_mode=weighted_mean",
        "causal, mean, standardised": f"base={base},causal=true,pooling_mode=mean,standardize=true",
        "Bi": f"base={base}",
        "Bi, standardised": f"base={base},standardize=true",
        "Bi + MNTP": bi_mntp,
        "Bi + MNTP, standardised": f"{bi_mntp},standardize=true",
        "Bi + MNTP + SimCSE": f"{bi_mntp},adapter={simcse}",
    }
    done = {"MNTP": mntp, "SimCSE": simcse}
    ready = {name for name, path in done.items() if (path / "adapter_config.json").exists()}
    return {
        label: f"{spec},max_length=128,label={label.replace(',', ' -')}"
        for label, spec in rows.items()
        if all(name in ready for name in done if name in label)
    }


def word_models(work: Path) -> list[str]:
    """Standardising says nothing of words; MNTP models are read one token to the left, too."""
    rows = {k: v for k, v in models(work).items() if "standard" not in k and "weighted" not in k}
    moved = {k: v for k, v in rows.items() if "MNTP" in k}
    named = [spec.replace("causal - mean", "causal") for spec in rows.values()]
    return named + [f"{v},labels=next_token".replace(",label=", ",label=next token: ")
                    for v in moved.values()]  # fmt: skip


def make_table(shared: Path, work: Path, quick: bool) -> None:
    """All figures into benchmarks/results/recipe.json, with the curve of both trainings."""
    conll, ewt = shared / "conll2000", shared / "uner-ewt/en_ewt-ud-dev.iob2"
    cut = ["--train-sentences", "300", "--test-sentences", "100"] if quick else []
    cut = cut or ["--train-sentences", "2000", "--test-sentences", "600"]
    tagged = ["--train", str(conll / "train.txt"), "--test", str(conll / "test.txt"), *cut]
    stsb = [str(shared / "stsb/stsb-en-dev.csv"), *(["--limit", "100"] if quick else [])]
    calls = {
        "sts": (["sts", *stsb], list(models(work).values())),
        "pos": (["word", "--task", "pos", *tagged], word_models(work)),
        "chunk": (["word", "--task", "chunk", *tagged], word_models(work)),
        "ner": (["word", "--task", "ner", "--train", str(ewt), "--test-share", "0.2"],
                word_models(work)),
    }  # fmt: skip
    rows: list[dict] = []
    for name, (words, specs) in calls.items():
        output = work / f"eval-{name}.json"
        given = [word for spec in specs for word in ("--model", spec)]
        command = [sys.executable, "-m", "llm2vec_fast", "eval", *words, "--output", str(output)]
        subprocess.run([*command, *given], check=True)
        told = json.loads(output.read_text(encoding="utf-8"))
        rows += [
            {"task": name, "data": told["data"], "model": row["label"], **row["options"],
             **row["figures"]}
            for row in told["rows"]
        ]  # fmt: skip
    rows += [row for kind in ("mntp", "simcse") for row in curve(work, kind)]
    print(write_rows("recipe-smollm2-cpu", rows))


def curve(work: Path, kind: str) -> list[dict]:
    """Loss and STS-B dev against tokens, and what the training was."""
    log, config = work / kind / "training_log.jsonl", work / kind / "train_config.json"
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if "sts_spearman" in line]
    losses = [line for line in lines if "loss" in line]
    kept += losses[:: max(1, len(losses) // 50)] + losses[-1:]
    told = json.loads(config.read_text(encoding="utf-8"))
    paths = ("model_name_or_path", "peft_model_name_or_path", "output_dir", "train_file",
             "validation_file", "eval_file")  # fmt: skip
    settings = {name: value for name, value in told.items() if name not in paths}
    points = sorted(kept, key=lambda line: line["step"])
    return [{"training": kind, "config": settings, "curve": points}]


def ship(work: Path) -> None:
    """Both adapters in bf16 as package data; their card is written by hand from the table."""
    for kind in ("mntp", "simcse"):
        target = ADAPTERS / f"smollm2-135m-{kind}"
        target.mkdir(parents=True, exist_ok=True)
        weights = load_file(work / kind / "adapter_model.safetensors")
        save_file(
            {name: tensor.bfloat16() for name, tensor in weights.items()},
            target / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        for name in ("adapter_config.json", "llm2vec_config.json", "llm2vec_fast.json"):
            told = json.loads((work / kind / name).read_text(encoding="utf-8"))
            if name == "adapter_config.json":
                told["base_model_name_or_path"] = BASE_NAME
            if told.get("stacked_on"):  # in bf16 the adapter below is another file
                told["stacked_on"] = [hash_of(ADAPTERS / "smollm2-135m-mntp")]
            (target / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        print(target, sum(file.stat().st_size for file in target.iterdir()), "bytes")


def hash_of(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", "mntp", "simcse", "table", "ship"))
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared/data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a small part of the test data")
    told, fields = parser.parse_known_args()
    if fields and told.what not in ("mntp", "simcse"):
        parser.error(f"unknown words: {' '.join(fields)}")
    if told.what == "data":
        make_data(told.shared, told.work)
    elif told.what in ("mntp", "simcse"):
        run_training(told.what, told.shared, told.work, fields)
    elif told.what == "table":
        make_table(told.shared, told.work, told.quick)
    else:
        ship(told.work)


if __name__ == "__main__":
    main()
