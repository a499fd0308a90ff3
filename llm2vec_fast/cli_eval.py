"""`llm2vec-fast eval`: what models are worth, several side by side in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

eval_app = typer.Typer(help="Measure models, several side by side.", no_args_is_help=True)
MODELS = Option(
    help="Directory or hub name; or fields with commas between: base=DIR, adapter=DIR, "
    "causal=true, pooling_mode=mean, standardize=true, labels=next_token, dtype=float32, "
    "max_length=128, label=NAME. Repeat for several side by side."
)
REPORT = Option(help="JSON file for figures, models, versions and machine")
DEVICE = Option(help="cpu, cuda, cuda:1; default: a GPU if any")


@eval_app.command("sts")
def eval_sts(
    file: Annotated[Path, Argument(help="Pairs: csv, tsv, jsonl or parquet")],
    model: Annotated[list[str], MODELS],
    output: Annotated[Path | None, REPORT] = None,
    sentence1: Annotated[str, Option(help="Column of the first sentence")] = "sentence1",
    sentence2: Annotated[str, Option(help="Column of the second sentence")] = "sentence2",
    score: Annotated[str, Option(help="Column of people's score")] = "score",
    limit: Annotated[int | None, Option(help="Only the first N pairs")] = None,
    instruction: Annotated[str | None, Option(help="Put before every sentence")] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Rank correlation (Spearman, Pearson) of cosines with people's scores of sentence pairs."""
    from llm2vec_fast import evaluate

    specs = evaluate.parse_specs(model)
    pairs = evaluate.read_pairs(file, (sentence1, sentence2, score), limit)
    data = {"name": file.name, "files": evaluate.described(file), "limit": limit}
    _compare(
        "sts", data | {"instruction": instruction}, specs,
        lambda model, spec: evaluate.sts(model, pairs, spec.standardize, instruction),
        output, device,
    )  # fmt: skip


@eval_app.command("word")
def eval_word(
    train: Annotated[Path, Option(help="Tagged words (CoNLL, CoNLL-U, Universal NER)")],
    task: Annotated[str, Option(help="pos | chunk | ner")],
    model: Annotated[list[str], MODELS],
    test: Annotated[Path | None, Option(help="Tagged words to score on")] = None,
    test_share: Annotated[
        float | None, Option(help="Without --test: this share of --train's sentences, at random")
    ] = None,
    output: Annotated[Path | None, REPORT] = None,
    tag_column: Annotated[int | None, Option(help="Column of the tag, from 1")] = None,
    train_sentences: Annotated[int | None, Option(help="Only the first N")] = None,
    test_sentences: Annotated[int | None, Option(help="Only the first N")] = None,
    steps: Annotated[int, Option(help="Training steps of the linear layer")] = 1500,
    seed: Annotated[int, Option(help="Of the split, the layer and its training")] = 42,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """What a linear layer reads from frozen states: accuracy of words, F1 of spans."""
    from llm2vec_fast import evaluate

    specs = evaluate.parse_specs(model)
    if (test is None) == (test_share is None):
        raise ValueError("give either --test FILE or --test-share 0.2")
    if test is None:
        learnt = evaluate.read_tagged(train, task, tag_column)
        learnt, asked = evaluate.split(learnt, test_share, seed)
        learnt, asked = learnt[:train_sentences], asked[:test_sentences]
    else:
        learnt = evaluate.read_tagged(train, task, tag_column, train_sentences)
        asked = evaluate.read_tagged(test, task, tag_column, test_sentences)
    files = [train] if test is None else [train, test]
    data = {"name": f"{task}, {files[-1].name}", "files": evaluate.described(*files)}
    data |= {"task": task, "test_share": test_share, "steps": steps, "seed": seed}
    _compare(
        "word", data, specs,
        lambda model, spec: evaluate.word(
            model, learnt, asked, spans=task != "pos", labels=spec.labels, steps=steps, seed=seed
        ),
        output, device,
    )  # fmt: skip


@eval_app.command("retrieval")
def eval_retrieval(
    directory: Annotated[Path, Argument(help="corpus.jsonl, queries.jsonl, qrels/test.tsv")],
    model: Annotated[list[str], MODELS],
    output: Annotated[Path | None, REPORT] = None,
    split: Annotated[str, Option(help="qrels/<split>.tsv")] = "test",
    recall_at: Annotated[list[int] | None, Option(help="k of recall@k; default 10, 100")] = None,
    instruction: Annotated[str | None, Option(help="Put before every query")] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """nDCG@10 and recall@k of exact cosine search on a collection in BEIR's layout."""
    from llm2vec_fast import evaluate

    specs = evaluate.parse_specs(model)
    collection = evaluate.read_collection(directory, split)
    files = [directory / name for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")]
    data = {"name": f"{directory.resolve().name} {split}", "files": evaluate.described(*files)}
    ranks = tuple(recall_at or (10, 100))
    _compare(
        "retrieval", data | {"instruction": instruction}, specs,
        lambda model, spec: evaluate.retrieval(model, collection, instruction, ranks),
        output, device,
    )  # fmt: skip


@eval_app.command("mteb")
def eval_mteb(
    tasks: Annotated[
        list[str], Argument(help="Tasks of mteb by name, or local directories in BEIR's layout")
    ],
    model: Annotated[list[str], MODELS],
    output: Annotated[Path | None, REPORT] = None,
    results: Annotated[
        Path | None, Option(help="Directory of mteb's own files; tasks found there are not rerun")
    ] = None,
    instructions: Annotated[
        Path | None, Option(help="JSON: instruction by task's name or type; default: mteb's")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Main scores of mteb's tasks, with LLM2Vec's instructions. Needs the extra `mteb`."""
    from llm2vec_fast import evaluate

    specs = evaluate.parse_specs(model)
    try:
        from llm2vec_fast.integrations import mteb
    except ImportError as error:
        hint = "pip install 'llm2vec-fast[mteb]'"
        raise RuntimeError(f"mteb cannot be imported ({error}): {hint}") from error
    given = None if instructions is None else mteb.read_instructions(instructions)
    found = [
        mteb.retrieval_task(Path(task).resolve().name, evaluate.read_collection(task))
        if Path(task).is_dir()
        else mteb.find_task(task)
        for task in tasks
    ]
    revisions = {task.metadata.name: task.metadata.revision for task in found}
    data = {"name": ", ".join(revisions), "revisions": revisions, "instructions": given}
    data["mteb"] = mteb.VERSION
    _compare(
        "mteb", data, specs,
        lambda model, spec: mteb.scores(model, found, given, results),
        output, device,
    )  # fmt: skip


def _compare(task: str, data: dict, specs: list, measure, output: Path | None, device) -> None:
    from llm2vec_fast import evaluate
    from llm2vec_fast.doctor import machine

    report = evaluate.Report(task, data, machine())
    evaluate.compare(
        report, specs, measure, output, device,
        progress=lambda label: typer.echo(f"{task}: {label}", err=True),
    )  # fmt: skip
    report.show()
    if output is not None:
        typer.echo(f"written: {output}")
