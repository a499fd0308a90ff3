"""A task of mteb on your own data, no hub: python examples/mteb_local_task.py MODEL_DIR BEIR_DIR

BEIR_DIR holds corpus.jsonl, queries.jsonl and qrels/test.tsv. The same from the command line, with
several models side by side: llm2vec-fast eval mteb BEIR_DIR --model MODEL_DIR
"""

import sys
from pathlib import Path

import mteb

from llm2vec_fast import LLM2Vec
from llm2vec_fast.evaluate import read_collection
from llm2vec_fast.integrations.mteb import MtebEncoder, retrieval_task

model_dir, directory = sys.argv[1:]
task = retrieval_task(
    Path(directory).resolve().name,
    read_collection(directory),
    instruction="Given a question, retrieve the passage that answers it",
)
encoder = MtebEncoder(LLM2Vec.from_pretrained(model_dir))
result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
for name, value in result.task_results[0].scores["test"][0].items():
    if name in ("ndcg_at_10", "recall_at_10", "mrr_at_10"):
        print(f"{name}: {value:.4f}")
