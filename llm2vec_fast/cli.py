"""The command line: each command is a thin door to a function of the package."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="llm2vec-fast",
    help="Decoder-only LLMs as text encoders: train them, embed corpora, search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Measure models, several side by side.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
Argument, Option = typer.Argument, typer.Option
INPUTS = Argument(help="Files (txt, jsonl, csv, tsv, parquet; .gz, .zst), folders, globs, URLs, -")
BIDIRECTIONAL = Option("--bidirectional/--causal", help="The attention mask; default: as saved.")
MODELS = Option(
    help="Directory or hub name; or fields with commas between: base=DIR, adapter=DIR, "
    "causal=true, pooling_mode=mean, standardize=true, labels=next_token, dtype=float32, "
    "max_length=128, label=NAME. Repeat for several side by side."
)
REPORT = Option(help="JSON file for figures, models, versions and machine")
DEVICE = Option(help="cpu, cuda, cuda:1; default: a GPU if any")


@app.command()
def embed(
    inputs: Annotated[list[str], INPUTS],
    model: Annotated[str, Option(help="Path or hub name of the model")],
    output: Annotated[Path, Option(help="Directory for the shards; the same one resumes")],
    adapters: Annotated[list[str], Option("--adapter", help="LoRA; repeat to stack")] = (),
    whole_files: Annotated[bool, Option("--whole-files", help="Each file is one document")] = False,
    text_column: Annotated[str, Option(help="Column of the text")] = "text",
    id_column: Annotated[str | None, Option(help="Column of the id")] = None,
    keep: Annotated[list[str], Option(help="Column to carry along; repeat")] = (),
    instruction: Annotated[str | None, Option(help="Put before every text")] = None,
    precision: Annotated[str, Option(help="float16 | float32 | int8 | binary")] = "float16",
    output_format: Annotated[str, Option(help="parquet | npy (to map into memory)")] = "parquet",
    dtype: Annotated[str, Option(help="auto | bfloat16 | float16 | float32 | fp8")] = "auto",
    truncate_dim: Annotated[int | None, Option(help="Keep the first N dimensions")] = None,
    normalize: Annotated[bool, Option("--normalize", help="To length one")] = False,
    pooling_mode: Annotated[str | None, Option(help="mean | weighted_mean | last_token ..")] = None,
    max_length: Annotated[int | None, Option(help="Tokens of a document at most")] = None,
    enable_bidirectional: Annotated[bool | None, BIDIRECTIONAL] = None,
    tokens_per_batch: Annotated[int | None, Option(help="Tokens in a forward pass")] = None,
    rows_per_shard: Annotated[int, Option(help="Documents of a job and shard")] = 16_384,
    on_error: Annotated[str, Option(help="A row that is not text: raise | skip")] = "raise",
    append: Annotated[bool, Option("--append", help="Add new inputs to a finished job")] = False,
    verify: Annotated[bool, Option("--verify", help="Redo finished shards if damaged")] = False,
    unique_ids: Annotated[bool, Option("--unique-ids", help="Refuse ids that occur twice")] = False,
    device: Annotated[str | None, DEVICE] = None,
    profile: Annotated[bool, Option("--profile", help="Tell which stage is the limit")] = False,
    as_json: Annotated[bool, Option("--json", help="The summary as one JSON object")] = False,
) -> None:
    """Embed a corpus into shards of vectors. Interrupted? The same command resumes.

    Several GPUs: torchrun --nproc-per-node 8 -m llm2vec_fast embed ...
    """
    options = dict(locals())  # the options have the names that the function knows
    from llm2vec_fast.corpus import embed as run

    del options["as_json"]
    summary = run(**options)
    if summary.rank == 0:
        typer.echo(summary.as_json() if as_json else str(summary))


@app.command()
def search(
    directory: Annotated[Path, Argument(help="The output of `embed`")],
    queries: Annotated[list[str], Argument(help="One or more questions")],
    instruction: Annotated[str | None, Option(help="Put before every query")] = None,
    k: Annotated[int, Option(help="Answers per query")] = 10,
    as_json: Annotated[bool, Option("--json", help="One JSON object a line")] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Search a finished job by cosine, with the model that made it."""
    from llm2vec_fast.corpus import search as run
    from llm2vec_fast.corpus.search import hits_as_json
    from llm2vec_fast.show import show_hits

    answers = run(directory, queries, k=k, instruction=instruction, device=device)
    for query, hits in zip(queries, answers, strict=True):
        if as_json:
            typer.echo(hits_as_json(query, hits))
        else:
            show_hits(query, hits)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    kind: Annotated[str, Argument(help="mntp | simcse | supervised")],
    config: Annotated[Path | None, Argument(help="Flat JSON, as the official files")] = None,
    fields: Annotated[
        bool, Option("--fields", help="Print all fields and their defaults, as a file to fill in")
    ] = False,
) -> None:
    """Train an adapter. Every field can also be given as --field value; the file may be left out.

    Interrupted? The same command goes on from the newest checkpoint. Several GPUs:
    torchrun --nproc-per-node 8 -m llm2vec_fast train ...
    """
    from llm2vec_fast.train import how_to_load, load
    from llm2vec_fast.train import train as run

    if fields:
        typer.echo(json.dumps(_training_fields(kind), indent=2))
        return
    words = list(context.args)
    if config is not None and str(config).startswith("--"):  # no file: fields follow at once
        words, config = [str(config), *words], None
    settled, lines = load(kind, config, words)
    speaks = os.environ.get("RANK", "0") == "0"  # of the ranks that torchrun starts
    for line in lines if speaks else ():
        typer.echo(line, err=True)
    summary = run(settled, _sts_figures(settled))
    if speaks:
        typer.echo(f"to load it: {how_to_load(settled)}", err=True)
        typer.echo(json.dumps(dataclasses.asdict(summary)))


def _training_fields(kind: str) -> dict:
    """Every field that a training uses, with its default; what has none is to be filled in."""
    from llm2vec_fast.train import as_json, load

    given = {"model_name_or_path": "...", "output_dir": "...", "train_file": "..."}
    told = as_json(load(kind, None, given)[0])
    return told | {"model_name_or_path": "", "output_dir": "", "train_file": []}


def _sts_figures(config):
    """Spearman of eval_file during training; train and evaluate do not know each other."""
    if config.eval_file is None:
        return None
    from llm2vec_fast.evaluate import read_pairs, sts

    pairs = read_pairs(config.eval_file)  # now: a fault in it must not end hours of training
    return lambda encoder: {"sts_spearman": sts(encoder, pairs)["spearman"]}


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


@app.command()
def bench(
    model: Annotated[str, Option(help="Path or hub name of the model")],
    files: Annotated[
        list[str] | None,
        Argument(help="Your texts, as `embed` reads them; default: docstrings of Python's library"),
    ] = None,
    adapter: Annotated[list[str] | None, Option(help="LoRA adapter; repeat to stack")] = None,
    text_column: Annotated[str, Option(help="Column of the text")] = "text",
    texts: Annotated[int, Option(min=1, help="At most so many, from the first on")] = 200,
    minutes: Annotated[float, Option(min=0, help="In all; at least two rounds")] = 1,
    dtype: Annotated[str, Option(help="Computing: auto | bfloat16 | float16 | float32")] = "auto",
    device: Annotated[str | None, DEVICE] = None,
    tokens_per_batch: Annotated[int | None, Option(help="Tokens in our forward pass")] = None,
    output: Annotated[Path | None, Option("--json", help="A file for the rows, too")] = None,
) -> None:
    """Your model on your texts: speed of llm2vec-fast and of stock transformers, same vectors."""
    from llm2vec_fast import bench as run
    from llm2vec_fast.demo import sample
    from llm2vec_fast.doctor import machine
    from llm2vec_fast.encoder import LLM2Vec
    from llm2vec_fast.model.checkpoint import write_json

    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"--json {output}: name a file in a directory that exists")
    own = run.read_texts(files, text_column, texts) if files else None
    corpus = own or [text for _, text in sample(texts)]
    encoder = LLM2Vec.from_pretrained(model, adapter, dtype=dtype, device=device)
    here = machine()
    for n, rows in enumerate(run.compare(encoder, corpus, minutes, tokens_per_batch), 1):
        typer.echo(f"round {n}: {rows[0]['all_seconds'][-1]:.1f} s for ours", err=True)
        if output is not None:  # after every round: a cut run keeps what it has
            write_json({"machine": here, "rows": rows}, output)
    run.show(rows, here)


@app.command()
def doctor(
    model: Annotated[str | None, Option(help="Also look at this model's directory")] = None,
    gpu: Annotated[bool, Option("--gpu", help="Check every GPU kernel against fp64")] = False,
) -> None:
    """Show the machine, versions, compilers, and which backend runs each operation, and why."""
    from llm2vec_fast.doctor import check_kernels, report

    report(model)
    if gpu and not check_kernels():
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Embed 1,000 docstrings of Python's library with a real model, and search them."""
    from llm2vec_fast.demo import run

    run()


class Stopped(BaseException):
    """SIGINT or SIGTERM. Not an Exception, so that nothing on the way takes it for an error, nor
    KeyboardInterrupt, which typer turns into a return value.
    """


def _stop(number: int, frame) -> None:
    raise Stopped(128 + number)


def main() -> None:
    """Runs a command; what a user can mend is told in one line, without a traceback."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _stop)
    try:
        code = app(standalone_mode=False)  # of typer.Exit, which does not come through
        sys.exit(code if isinstance(code, int) else 0)
    except Stopped as stop:
        print("interrupted: nothing finished is lost, the same command resumes", file=sys.stderr)
        sys.stderr.flush()
        # At once: a thread may still wait for standard input, and Python's way out aborts on that.
        os._exit(stop.args[0])
    except typer.Abort:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        notes = getattr(error, "__notes__", [])
        print("error: " + "\n".join([str(error), *notes]), file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
