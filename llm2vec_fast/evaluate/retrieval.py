"""Retrieval on a collection in BEIR's layout, by exact cosine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2vec_fast.corpus.search import Best
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.evaluate.extras import scorer

# Documents embedded and compared with all queries at a time.
BLOCK = 16_384
NDCG_AT = 10


@dataclass(frozen=True)
class Collection:
    """documents and queries: id -> text; relevant: query id -> {document id: grade}.

    queries has only those with a relevant document; left_out counts the others of queries.jsonl.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]
    left_out: int = 0


def retrieval(
    model: LLM2Vec,
    collection: Collection,
    instruction: str | None = None,
    recall_at: Sequence[int] = (10, 100),
) -> dict:
    """nDCG@10 and recall@k, times 100, mean over the queries, as trec_eval counts them.

    instruction: put before every query, never before a document
    recall_at:   the k of recall@k
    returns:     {"ndcg@10", "recall@<k>" for each k, "queries", "documents", "left_out"}

    A document whose id is the query's own is never an answer, as in BEIR. Documents without text
    are never found. Equal cosines: the document that stands first in the corpus wins a place.
    """
    if not recall_at or min(recall_at) < 1:
        raise ValueError(f"recall is counted at ranks from 1 on, got {list(recall_at)}")
    evaluator = scorer("pytrec_eval", "pytrec-eval-terrier").RelevanceEvaluator(
        collection.relevant,
        {f"ndcg_cut.{NDCG_AT}", "recall." + ",".join(map(str, sorted(set(recall_at))))},
    )
    found = evaluator.evaluate(_answers(model, collection, instruction, max(NDCG_AT, *recall_at)))

    def mean(measure: str) -> float:
        # A query for which nothing was found is absent there, and counts as 0.
        return 100 * sum(row[measure] for row in found.values()) / len(collection.queries)

    return {
        f"ndcg@{NDCG_AT}": mean(f"ndcg_cut_{NDCG_AT}"),
        **{f"recall@{k}": mean(f"recall_{k}") for k in recall_at},
        "queries": len(collection.queries),
        "documents": len(collection.documents),
        "left_out": collection.left_out,
    }


def _answers(
    model: LLM2Vec, collection: Collection, instruction: str | None, k: int
) -> dict[str, dict[str, float]]:
    """query id -> {document id: score} of the best k. The score falls by one a rank: trec_eval
    sorts again and would break ties of the cosine by id.
    """
    queries, ids = list(collection.queries), list(collection.documents)
    texts = list(collection.documents.values())
    query_QD = model.encode(
        list(collection.queries.values()), instruction=instruction, normalize=True
    ).to(model.device)
    best = Best(len(queries), min(k + 1, len(ids)))  # one more: the query's own id may be there
    for first in range(0, len(ids), BLOCK):
        block_ND = model.encode(texts[first : first + BLOCK], normalize=True).to(model.device)
        empty_N = ~block_ND.any(dim=1)
        best.add((query_QD @ block_ND.T).masked_fill(empty_N, -torch.inf), first)
    answers: dict[str, dict[str, float]] = {query: {} for query in queries}
    for q, key in zip(best.query.tolist(), best.key.tolist(), strict=True):
        query, document = queries[q], ids[key]
        if document != query and len(answers[query]) < k:
            answers[query][document] = float(k - len(answers[query]))
    return answers


def read_collection(directory: str | Path, split: str = "test") -> Collection:
    """Reads BEIR's layout: corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and
    qrels/<split>.tsv (query-id, corpus-id, score, behind a header). A document is its title and its
    text with a space between.

    raises: ValueError (or FileNotFoundError) naming the file and line that is malformed, an id that
            stands twice or that the qrels alone know, and for a collection without documents or
            without a query that has a relevant document
    """
    directory = Path(directory)
    documents = dict(_texts(directory / "corpus.jsonl"))
    queries = dict(_texts(directory / "queries.jsonl"))
    judged = directory / "qrels" / f"{split}.tsv"
    relevant: dict[str, dict[str, int]] = {}
    for where, query, document, grade in _judgements(judged):
        for name, kind, there in (
            (query, "query", queries),
            (document, "document", documents),
        ):
            if name not in there:
                raise ValueError(f"{where}: there is no {kind} with the id {name!r}")
        if document in relevant.setdefault(query, {}):
            raise ValueError(f"{where}: {query!r} and {document!r} stand twice")
        relevant[query][document] = grade
    relevant = {q: rows for q, rows in relevant.items() if max(rows.values()) > 0}
    if not relevant:
        raise ValueError(f"{judged}: no query has a relevant document (a score above 0)")
    asked = {query: queries[query] for query in queries if query in relevant}
    return Collection(documents, asked, relevant, len(queries) - len(asked))


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of each line."""
    seen: set[str] = set()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            fields = [row.get(name) for name in ("_id", "text")] if isinstance(row, dict) else []
            if not fields or not all(isinstance(field, str) for field in fields):
                raise ValueError(f"{where} is not an object with the texts _id and text")
            if fields[0] in seen:
                raise ValueError(f"{where}: the id {fields[0]!r} stands twice")
            seen.add(fields[0])
            yield fields[0], f"{row.get('title') or ''} {fields[1]}".strip()
    if not seen:
        raise ValueError(f"{path} is empty")


def _judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(where, query id, document id, grade) of each line after the header."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            found = line.rstrip("\r\n").split("\t")
            if number == 1 or not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                query, document, grade = found[0], found[1], int(found[2])
            except (IndexError, ValueError) as error:
                raise ValueError(
                    f"{where} is not a query's id, a document's id and a whole number, with tabs "
                    f"between: {line.strip()!r}"
                ) from error
            yield where, query, document, grade
