"""The command line: each command is a thin door to a function of the package."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="llm2vec-fast",
    help="Decoder-only LLMs as text encoders: embed corpora, search them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Argument, Option = typer.Argument, typer.Option
BIDIRECTIONAL = Option("--bidirectional/--causal", help="The attention mask; default: as saved.")


@app.command()
def embed(
    inputs: Annotated[
        list[str],
        Argument(help="Files (txt, jsonl, csv, tsv, parquet; .gz, .zst), folders, globs, URLs, -"),
    ],
    model: Annotated[str, Option(help="Path or hub name of the model")],
    output: Annotated[Path, Option(help="Directory for the shards; the same one resumes")],
    adapter: Annotated[list[str] | None, Option(help="LoRA adapter; repeat to stack")] = None,
    whole_files: Annotated[bool, Option("--whole-files", help="Each file is one document")] = False,
    text_column: Annotated[str, Option(help="Column of the text")] = "text",
    id_column: Annotated[str | None, Option(help="Column of the id")] = None,
    keep: Annotated[list[str] | None, Option(help="Column to carry along; repeat")] = None,
    instruction: Annotated[str | None, Option(help="Put before every text")] = None,
    precision: Annotated[str, Option(help="float16 | float32 | int8 | binary")] = "float16",
    output_format: Annotated[str, Option(help="parquet | npy (to map into memory)")] = "parquet",
    dtype: Annotated[str, Option(help="Computing: auto | bfloat16 | float16 | float32")] = "auto",
    truncate_dim: Annotated[int | None, Option(help="Keep the first N dimensions")] = None,
    normalize: Annotated[bool, Option("--normalize", help="To length one")] = False,
    pooling_mode: Annotated[
        str | None, Option(help="mean | weighted_mean | last_token ...")
    ] = None,
    max_length: Annotated[int | None, Option(help="Tokens of a document at most")] = None,
    bidirectional: Annotated[bool | None, BIDIRECTIONAL] = None,
    tokens_per_batch: Annotated[int | None, Option(help="Tokens in a forward pass")] = None,
    rows_per_shard: Annotated[int, Option(help="Documents of a job and shard")] = 16_384,
    on_error: Annotated[str, Option(help="A row that is not text: raise | skip")] = "raise",
    append: Annotated[bool, Option("--append", help="Add new inputs to a finished job")] = False,
    verify: Annotated[
        bool, Option("--verify", help="Read finished shards whole; redo damaged ones")
    ] = False,
    unique_ids: Annotated[
        bool, Option("--unique-ids", help="Refuse an id that occurs twice")
    ] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default: a GPU if any")] = None,
    as_json: Annotated[bool, Option("--json", help="The summary as one JSON object")] = False,
) -> None:
    """Embed a corpus into shards of vectors. Interrupted? The same command resumes.

    Several GPUs: torchrun --nproc-per-node 8 -m llm2vec_fast embed ...
    """
    from llm2vec_fast.corpus import embed as run

    summary = run(
        inputs, model, output, adapters=adapter or (), whole_files=whole_files,
        text_column=text_column, id_column=id_column, keep=keep or (), instruction=instruction,
        precision=precision, output_format=output_format, dtype=dtype, truncate_dim=truncate_dim,
        normalize=normalize, pooling_mode=pooling_mode, max_length=max_length,
        enable_bidirectional=bidirectional, tokens_per_batch=tokens_per_batch,
        rows_per_shard=rows_per_shard, on_error=on_error, append=append, verify=verify,
        unique_ids=unique_ids, device=device,
    )  # fmt: skip
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
