"""The recipe of LLM2Vec on SmolLM2-135M, from text to the table of its effect, on any machine.

    python -m benchmarks.recipe data   --shared DIR --work DIR    # the texts to train on
    python -m benchmarks.recipe mntp   --work DIR                 # hours on a CPU; resumes
    python -m benchmarks.recipe simcse --work DIR                 # on top of it; resumes
    python -m benchmarks.recipe docstrings --work DIR             # supervised, on top; resumes
    python -m benchmarks.recipe table  --shared DIR --work DIR    # STS-B, CoNLL-2000, UNER
    python -m benchmarks.recipe ship   --work DIR                 # the adapters as package data

Texts: WikiText-2 (valid and test), the State of the Union addresses, and the docstrings of this
Python's standard library; nothing else. The pairs of `docstrings` are made of the last: a qualified
name in words and its docstring, the first sentence of a docstring and the rest. The documents of
the demo are kept out of the pairs; finding them by the words of their names is the table's
retrieval task: in-domain, and labelled so. Further words after a training are its fields, as
`--max_steps 100`.
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
from llm2vec_fast.demo import docstrings, ensure_model, sample

HERE = Path(__file__).parent
ADAPTERS = HERE.parent / "llm2vec_fast/adapters"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = ("wikitext-2/valid.txt", "wikitext-2/test.txt", "state-union/addresses.txt")
HELD_OUT = 150  # texts: every n-th is looked at and not trained on
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
WORDS = range(6, 61)  # of a sentence for SimCSE
TRAININGS = ("mntp", "simcse", "docstrings")  # each upon those before it


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
    """mntp.jsonl, held_out.jsonl, simcse.jsonl, docstrings.jsonl and the collection `names`."""
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
        write_lines(work / f"{name}.jsonl", [{"text": text} for text in rows])
    write_lines(work / "docstrings.jsonl", list(docstring_pairs()))
    make_collection(work / "names")


def write_lines(path: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    characters = sum(len(text) for row in rows for text in row.values())
    print(f"{path.name}: {len(rows)} rows, {characters} characters")


def words_of(name: str) -> str:
    """A qualified name in words: zipfile.ZipFile.read_all -> zipfile zip file read all."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return " ".join(dict.fromkeys(part.lower() for part in parts))


def docstring_pairs() -> Iterator[dict]:
    """Queries and positives of every docstring but the demo's, each docstring once."""
    seen = {text for _, text in sample()}
    for name, text in docstrings():
        if text in seen:
            continue
        seen.add(text)
        words = words_of(name)
        yield {"query": words, "positive": text}
        first, rest = parts(text)
        if not (len(first.split()) in range(3, 31) and len(rest) >= 40):
            continue
        # A name that holds the sentence's first word ("compress") tells that it is a verb.
        if first.split()[0].lower().rstrip("s") in words.split():
            first = f"how to {first[0].lower()}{first[1:].rstrip('.')}"
        yield {"query": first, "positive": rest}


def parts(text: str) -> tuple[str, str]:
    """The first paragraph of a docstring in one line, and the rest."""
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest


def make_collection(directory: Path) -> None:
    """The demo's documents in BEIR's layout, each asked for by the words of its name; but not those
    that share their first paragraph or their rest with a docstring that pairs are made of.
    """
    (directory / "qrels").mkdir(parents=True, exist_ok=True)
    documents = sample()
    known = {text for _, text in documents}
    trained = {part for _, text in docstrings() if text not in known for part in parts(text)} - {""}
    write_lines(directory / "corpus.jsonl", [{"_id": f"d{i}", "text": text}
                                             for i, (_, text) in enumerate(documents)])  # fmt: skip
    asked = [i for i, (_, text) in enumerate(documents) if trained.isdisjoint(parts(text))]
    write_lines(directory / "queries.jsonl",
                [{"_id": f"q{i}", "text": words_of(documents[i][0])} for i in asked])  # fmt: skip
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in asked)]
    (directory / "qrels/test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
        below = [str(work / name) for name in TRAININGS[: TRAININGS.index(kind)]]
        given |= {"peft_model_name_or_path": json.dumps(below), "eval_steps": 60}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    name = "docstrings_supervised" if kind == "docstrings" else kind
    config = HERE.parent / f"examples/train/smollm2_{name}.json"
    command = [sys.executable, "-m", "llm2vec_fast", "train", name.split("_")[-1], str(config)]
    subprocess.run([*command, *words, *fields], check=True)


def models(work: Path) -> dict[str, str]:
    """{row of the table: model as `llm2vec-fast eval` takes it}."""
    base = ensure_model()
    bi_mntp = f"base={base},adapter={work / 'mntp'}"
    bi_simcse = f"{bi_mntp},adapter={work / 'simcse'}"
    rows = {
        "causal, mean": f"base={base},causal=true,pooling_mode=mean",
        "causal, weighted mean": f"base={base},causal=true,pooling_mode=weighted_mean",
        "causal, mean, standardised": f"base={base},causal=true,pooling_mode=mean,standardize=true",
        "Bi": f"base={base}",
        "Bi, standardised": f"base={base},standardize=true",
        "Bi + MNTP": bi_mntp,
        "Bi + MNTP, standardised": f"{bi_mntp},standardize=true",
        "Bi + MNTP + SimCSE": bi_simcse,
        "Bi + MNTP + SimCSE + docstrings": f"{bi_simcse},adapter={work / 'docstrings'}",
    }
    done = {"MNTP": "mntp", "SimCSE": "simcse", "docstrings": "docstrings"}
    ready = {name for name, at in done.items() if (work / at / "adapter_config.json").exists()}
    return {
        label: f"{spec},max_length=128,label={label.replace(',', ' -')}"
        for label, spec in rows.items()
        if all(name in ready for name in done if name in label)
    }


def chosen(work: Path, without: tuple[str, ...]) -> list[str]:
    """The models of the rows that have none of these words in their name."""
    rows = models(work).items()
    return [spec for name, spec in rows if not any(word in name for word in without)]


def word_models(work: Path) -> list[str]:
    """Standardising says nothing of words; MNTP models are read one token to the left, too."""
    rows = chosen(work, without=("standard", "weighted", "docstrings"))
    named = [spec.replace("causal - mean", "causal") for spec in rows]
    return named + [f"{spec},labels=next_token".replace(",label=", ",label=next token: ")
                    for spec in rows if "label=Bi + MNTP" in spec]  # fmt: skip


def make_table(shared: Path, work: Path, quick: bool) -> None:
    """All figures into benchmarks/results/recipe-smollm2-cpu.json, with the trainings' curves."""
    conll, ewt = shared / "conll2000", shared / "uner-ewt/en_ewt-ud-dev.iob2"
    cut = ["--train-sentences", "300", "--test-sentences", "100"] if quick else []
    cut = cut or ["--train-sentences", "2000", "--test-sentences", "600"]
    tagged = ["--train", str(conll / "train.txt"), "--test", str(conll / "test.txt"), *cut]
    stsb = [str(shared / "stsb/stsb-en-dev.csv"), *(["--limit", "100"] if quick else [])]
    calls = {
        "sts": (["sts", *stsb], chosen(work, without=("docstrings",))),
        "pos": (["word", "--task", "pos", *tagged], word_models(work)),
        "chunk": (["word", "--task", "chunk", *tagged], word_models(work)),
        "ner": (["word", "--task", "ner", "--train", str(ewt), "--test-share", "0.2"],
                word_models(work)),
        "retrieval": (["retrieval", str(work / "names")],
                      chosen(work, without=("standard", "weighted"))),
    }  # fmt: skip
    rows: list[dict] = []
    for name, (words, specs) in calls.items():
        output = work / f"eval-{name}.json"
        given = [word for spec in specs for word in ("--model", spec)]
        command = [sys.executable, "-m", "llm2vec_fast", "eval", *words, "--output", str(output)]
        if not output.exists():  # an hour on a CPU: what is there is not done again
            subprocess.run([*command, *given], check=True)
        told = json.loads(output.read_text(encoding="utf-8"))
        rows += [
            {"task": name, "in_domain": name == "retrieval", "data": told["data"],
             "model": row["label"], **row["options"], **row["figures"]}
            for row in told["rows"]
        ]  # fmt: skip
    rows += [row for kind in TRAININGS for row in curve(work, kind)]
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
    """The adapters in bf16 as package data; their card is written by hand from the table."""
    for kind in TRAININGS:
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
                below = TRAININGS[: TRAININGS.index(kind)]
                told["stacked_on"] = [hash_of(ADAPTERS / f"smollm2-135m-{name}") for name in below]
            (target / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        print(target, sum(file.stat().st_size for file in target.iterdir()), "bytes")


def hash_of(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", *TRAININGS, "table", "ship"))
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared/data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a small part of the test data")
    told, fields = parser.parse_known_args()
    if fields and told.what not in TRAININGS:
        parser.error(f"unknown words: {' '.join(fields)}")
    if told.what == "data":
        make_data(told.shared, told.work)
    elif told.what in TRAININGS:
        run_training(told.what, told.shared, told.work, fields)
    elif told.what == "table":
        make_table(told.shared, told.work, told.quick)
    else:
        ship(told.work)


if __name__ == "__main__":
    main()
