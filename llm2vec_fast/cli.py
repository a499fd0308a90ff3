"""The command line: each command is a thin door to a function of the package."""

from __future__ import annotations

import json
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
Option = typer.Option
BIDIRECTIONAL = Option("--bidirectional/--causal", help="The attention mask; default: as saved.")


@app.command()
def embed(
    inputs: Annotated[list[Path], typer.Argument(help=".txt (a line a document) or .jsonl files")],
    model: Annotated[str, Option(help="Path or hub name of the model")],
    output: Annotated[Path, Option(help="Directory for the shards; the same one resumes")],
    adapter: Annotated[list[str] | None, Option(help="LoRA adapter; repeat to stack")] = None,
    text_column: Annotated[str, Option(help="jsonl: field of the text")] = "text",
    id_column: Annotated[str | None, Option(help="jsonl: field of the id")] = None,
    keep: Annotated[list[str] | None, Option(help="jsonl: field to carry along; repeat")] = None,
    instruction: Annotated[str | None, Option(help="Put before every text")] = None,
    precision: Annotated[str, Option(help="float16 | float32 | int8 | binary")] = "float16",
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
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default: a GPU if any")] = None,
) -> None:
    """Embed files of texts into Parquet shards. Interrupted? The same command resumes."""
    from llm2vec_fast.corpus import embed as run

    summary = run(
        list(inputs), model, output, adapters=adapter or (), text_column=text_column,
        id_column=id_column, keep=keep or (), instruction=instruction, precision=precision,
        dtype=dtype, truncate_dim=truncate_dim, normalize=normalize, pooling_mode=pooling_mode,
        max_length=max_length, enable_bidirectional=bidirectional, device=device,
        tokens_per_batch=tokens_per_batch, rows_per_shard=rows_per_shard, on_error=on_error,
    )  # fmt: skip
    typer.echo(str(summary))


@app.command()
def search(
    directory: Annotated[Path, typer.Argument(help="The output of `embed`")],
    queries: Annotated[list[str], typer.Argument(help="One or more questions")],
    instruction: Annotated[str | None, Option(help="Put before every query")] = None,
    k: Annotated[int, Option(help="Answers per query")] = 10,
    as_json: Annotated[bool, Option("--json", help="One JSON object a line")] = False,
    device: Annotated[str | None, Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Search a finished job by cosine, with the model that made it."""
    from llm2vec_fast.corpus import search as run
    from llm2vec_fast.show import show_hits

    answers = run(directory, queries, k=k, instruction=instruction, device=device)
    for query, hits in zip(queries, answers, strict=True):
        if as_json:
            rows = [{"score": hit.score, "id": hit.id, **hit.kept} for hit in hits]
            typer.echo(json.dumps({"query": query, "hits": rows}, ensure_ascii=False))
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


def main() -> None:
    """Runs a command; what a user can mend is told in one line, without a traceback."""
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted: nothing finished is lost, the same command resumes", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
