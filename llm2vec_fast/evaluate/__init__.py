"""Measuring encoders: sentence similarity, word-level probes, retrieval; models side by side."""

from llm2vec_fast.evaluate.models import ModelSpec, parse_specs
from llm2vec_fast.evaluate.report import Report, compare, described
from llm2vec_fast.evaluate.retrieval import Collection, read_collection, retrieval
from llm2vec_fast.evaluate.states import word_states
from llm2vec_fast.evaluate.sts import Pairs, read_pairs, sts, sts_spearman
from llm2vec_fast.evaluate.tagged import Sentence, read_tagged, split
from llm2vec_fast.evaluate.word import word

__all__ = [
    "Collection",
    "ModelSpec",
    "Pairs",
    "Report",
    "Sentence",
    "compare",
    "described",
    "parse_specs",
    "read_collection",
    "read_pairs",
    "read_tagged",
    "retrieval",
    "split",
    "sts",
    "sts_spearman",
    "word",
    "word_states",
]
