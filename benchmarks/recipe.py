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
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llm2vec_fast.demo import docstrings, ensure_model

HERE = Path(__file__).parent
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
        given["validation_file"] = work / "held_out.jsonl"
    else:
        given["peft_model_name_or_path"] = work / "mntp"
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llm2vec_fast", "train", kind]
    subprocess.run(
        [*command, str(HERE / f"recipes/smollm2-{kind}.json"), *words, *fields], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", "mntp", "simcse", "table", "ship"))
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared/data")
    parser.add_argument("--work", type=Path, required=True)
    told, fields = parser.parse_known_args()
    if fields and told.what not in ("mntp", "simcse"):
        parser.error(f"unknown words: {' '.join(fields)}")
    if told.what == "data":
        make_data(told.shared, told.work)
    elif told.what in ("mntp", "simcse"):
        run_training(told.what, told.shared, told.work, fields)


if __name__ == "__main__":
    main()
