"""A question and the passages for it, as a prompt.

    python examples/rag_search.py MODEL_DIR JSONL OUTPUT QUESTION

JSONL has `title` and `text`. The corpus is embedded once; the next question only searches.
"""

import sys

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search

model_dir, source, output, question = sys.argv[1:]
model = LLM2Vec.from_pretrained(model_dir)
# Documents have no instruction, as in LLM2Vec's training; a question has the one of its task.
embed(source, model, output, keep=["title", "text"])
instruction = "Given a question, retrieve passages that answer the question:"
(hits,) = search(output, [question], k=3, instruction=instruction, model=model)

print("Answer the question from the passages alone, and name those that you used.\n")
for number, hit in enumerate(hits, 1):
    print(f"[{number}] {hit.kept['title']}\n{hit.kept['text']}\n")
print(f"Question: {question}")
