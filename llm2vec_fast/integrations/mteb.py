"""LLM2Vec in mteb 2: `mteb.evaluate(MtebEncoder(model), tasks)`.

Instructions as in LLM2Vec (arXiv:2404.05961, appendix): of each task its own, before queries and
before the texts of symmetric tasks, never before the documents of a retrieval.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from llm2vec_fast.encoder import LLM2Vec

VERSION = importlib.metadata.version("mteb")
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
SIMILAR = "Retrieve semantically similar text"
# Of a task that has no prompt of its own in mteb, by its type.
DEFAULTS = {
    "Retrieval": SEARCH,
    "Reranking": SEARCH,
    "InstructionRetrieval": SEARCH,
    "InstructionReranking": SEARCH,
    "STS": SIMILAR,
    "PairClassification": SIMILAR,
    "Summarization": "Given a summary, retrieve other semantically similar summaries",
    "BitextMining": "Retrieve parallel sentences",
    "Classification": "Classify the given text",
    "MultilabelClassification": "Classify the given text",
    "Clustering": "Identify the topic or theme of the given text",
}


class MtebEncoder(AbsEncoder):
    """An encoder for `mteb.evaluate`.

    instructions: by the name of a task or by its type; those that are absent are mteb's own for
                  the task, else DEFAULTS for its type. "" for none.
    name:         of the model in mteb's results, "organization/model"; default: its hub name, or
                  "local/" and the name of its directory. The revision is a hash of all that
                  decides the vectors, so that mteb's cache never takes one model for another.
    """

    def __init__(
        self,
        model: LLM2Vec,
        instructions: Mapping[str, str] | None = None,
        name: str | None = None,
    ):
        self.model, self.instructions = model, dict(instructions or {})
        self.prompts_dict = self.instructions
        told = json.dumps(model.describe() | {"instructions": self.instructions}, sort_keys=True)
        source = model.sources.name
        is_local = Path(source).expanduser().is_dir() or source.count("/") != 1
        config = model.model.config
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name or (f"local/{Path(source).resolve().name}" if is_local else source),
                "revision": hashlib.sha256(told.encode()).hexdigest()[:40],
                "n_parameters": config.n_parameters,
                "n_embedding_parameters": config.vocab_size * config.hidden_size,
                "max_tokens": model.settings["max_length"],
                "embed_dim": model.dimension,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["LLM2Vec", "PyTorch"],
                "use_instructions": True,
            }
        )

    def get_instruction(
        self, task_metadata: TaskMetadata, prompt_type: PromptType | None = None
    ) -> str:
        """What stands before the texts of a task, "" for nothing."""
        if prompt_type == PromptType.document:
            return ""
        own = task_metadata.prompt
        own = own.get("query") if isinstance(own, dict) else own
        name, kind = task_metadata.name, task_metadata.type
        given = self.instructions
        found = given.get(name, given.get(kind, own or DEFAULTS.get(kind, "")))
        return self._formatted(found) if found else ""

    def _formatted(self, instruction: str) -> str:
        """As the model was trained: official models with a colon behind it, E5-Mistral, Qwen3 and
        other models of sentence-transformers' layout between "Instruct:" and "Query:".
        """
        if not self.model.settings.get("verbatim_instruction"):
            return instruction if instruction.endswith(":") else instruction.rstrip(".") + ":"
        if "\n" in instruction:  # a whole prompt
            return instruction
        prompts = self.model.settings["prompts"].values()
        space = " " if any(prompt.endswith("Query: ") for prompt in prompts) else ""
        return f"Instruct: {instruction}\nQuery:{space}"

    def encode(
        self,
        inputs,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        precision: str = "float32",
    ) -> np.ndarray:
        """(N, D) fp32 vectors of the texts of a DataLoader.

        batch_size: not used: the model's `tokens_per_batch` bounds its batches
        raises:     ValueError for another precision than float32
        """
        if precision != "float32":
            raise ValueError(f"MtebEncoder gives float32 vectors alone, not {precision!r}")
        return self.model.encode(
            [text for batch in inputs for text in batch["text"]],
            instruction=self.get_instruction(task_metadata, prompt_type),
            show_progress_bar=show_progress_bar,
            convert_to_numpy=True,
        )


def scores(
    model: LLM2Vec,
    tasks: Sequence[AbsTask],
    instructions: Mapping[str, str] | None = None,
    results: str | Path | None = None,
) -> dict[str, float]:
    """The main score of each task, times 100, mean over its splits and subsets.

    results: a directory for mteb's own files; tasks that it has are not run again
    """
    cache = None if results is None else mteb.ResultCache(results)
    encoder = MtebEncoder(model, instructions)
    found = mteb.evaluate(encoder, tasks, cache=cache, show_progress_bar=False)
    return {row.task_name: 100 * float(row.get_score()) for row in found.task_results}


def find_task(name: str) -> AbsTask:
    """A task of mteb by its name; its data come from the hub.

    raises: ValueError that names the nearest match
    """
    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"mteb has no task {name!r}: {error.args[0]}") from error


def read_instructions(path: str | Path) -> dict[str, str]:
    """Instructions by the name or type of tasks, from a JSON object of texts.

    raises: ValueError naming the file
    """
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise ValueError(f"{path} must hold a JSON object of texts: the instruction by task")
    return told


class Collection(Protocol):
    """What `llm2vec_fast.evaluate.read_collection` gives.

    documents, queries: id -> text
    relevant:           query id -> {document id: grade}
    """

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]


def retrieval_task(name: str, data: Collection, instruction: str | None = None) -> AbsTask:
    """A retrieval task of mteb from data in memory, without a hub; main score nDCG@10.

    instruction: put before every query; default: DEFAULTS["Retrieval"]
    """
    rows = {
        kind: Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
        for kind, texts in (("corpus", data.documents), ("queries", data.queries))
    }
    told = json.dumps([data.documents, data.queries, data.relevant])
    revision = hashlib.sha256(told.encode()).hexdigest()[:40]

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description=f"Retrieval on local data: {name}",
            dataset={"path": f"local/{name}", "revision": revision},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["und-Zyyy"],
            main_score="ndcg_at_10",
            prompt=None if instruction is None else {"query": instruction},
        )
        ignore_identical_ids = True

        def load_data(self, *args, **options) -> None:
            grades = {query: dict(found) for query, found in data.relevant.items()}
            split = {**rows, "relevant_docs": grades, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Task()
