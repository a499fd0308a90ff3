"""A text file to Parquet, then a search: python examples/embed_corpus.py MODEL_DIR FILE OUTPUT"""

import sys

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search

model_dir, source, output = sys.argv[1:]
model = LLM2Vec.from_pretrained(model_dir)
print(embed(source, model, output, normalize=True))
for hit in search(output, "what is this about?", k=3, model=model)[0]:
    print(f"{hit.score:.3f}  {hit.id}")
