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
from typer import Argument, Option

from llm2vec_fast.cli_eval import DEVICE, eval_app

app = typer.Typer(
    name="llm2vec-fast",
    help="Decoder-only LLMs as text encoders: train them, embed corpora, search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(eval_app, name="eval")
INPUTS = Argument(help="Files (txt, jsonl, csv, tsv, parquet; .gz, .zst), folders, globs, URLs, -")
BIDIRECTIONAL = Option("--bidirectional/--causal", help="The attention mask; default: as saved.")


@app.command()
def embed(
    inputs: Annotated[list[str], INPUTS],
    model: Annotated[str, Option(help="Path or hub name of the model")],
    output: Annotated[str, Option(help="Directory or URL for shards; the same one resumes")],
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
    ray: Annotated[bool, Option("--ray", help="Ray's workers do the jobs, on all GPUs")] = False,
    address: Annotated[str | None, Option(help="Of a Ray cluster; default: found, or here")] = None,
    num_gpus_per_worker: Annotated[float | None, Option(help="With --ray; default 1")] = None,
    num_workers: Annotated[int | None, Option(help="With --ray; default: by the GPUs")] = None,
) -> None:
    """Embed a corpus into shards of vectors. Interrupted? The same command resumes.

    Several GPUs: torchrun --nproc-per-node 8 -m llm2vec_fast embed ...; machines: --ray
    """
    options = dict(locals())  # the options have the names that the function knows
    from llm2vec_fast.corpus import embed as run

    asked = [options.pop(name) for name in ("address", "num_gpus_per_worker", "num_workers")]
    if options.pop("ray"):
        from llm2vec_fast.corpus.ray import Cluster

        options["cluster"] = Cluster(*asked)
    elif asked != [None] * 3:
        raise ValueError("--address, --num-gpus-per-worker and --num-workers belong to --ray")
    del options["as_json"]
    summary = run(**options)
    if summary.rank == 0:
        typer.echo(summary.as_json() if as_json else str(summary))


@app.command()
def search(
    directory: Annotated[str, Argument(help="The output of `embed`")],
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
    from llm2vec_fast.train.data import read_texts

    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"--json {output}: name a file in a directory that exists")
    own = read_texts(files, text_column=text_column, limit=texts) if files else None
    corpus = own or [text for _, text in sample(texts)]
    encoder = LLM2Vec.from_pretrained(model, adapter, dtype=dtype, device=device)
    here = machine()
    for n, rows in enumerate(run.compare(encoder, corpus, minutes, tokens_per_batch), 1):
        typer.echo(f"round {n}: {rows[0]['all_seconds'][-1]:.1f} s for ours", err=True)
        if output is not None:  # after every round: a cut run keeps what it has
            write_json({"machine": here, "rows": rows}, output)
    run.show(rows, here)


@app.command()
def export(
    directory: Annotated[Path, Argument(help="A new directory")],
    model: Annotated[str, Option(help="Path or hub name of the model")],
    adapters: Annotated[list[str], Option("--adapter", help="LoRA; repeat to stack")] = (),
    dtype: Annotated[
        str | None, Option(help="float32 | bfloat16 | float16; default: as config.json says")
    ] = None,
) -> None:
    """Write a model with its adapters merged: for transformers, vLLM and other programs."""
    from llm2vec_fast.encoder import LLM2Vec
    from llm2vec_fast.integrations.export import export as run
    from llm2vec_fast.integrations.export import saved_dtype

    dtype = dtype or saved_dtype(model, adapters)
    for line in run(LLM2Vec.from_pretrained(model, adapters, dtype=dtype, device="cpu"), directory):
        typer.echo(f"note: {line}", err=True)
    typer.echo(f"written: {directory}")


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
