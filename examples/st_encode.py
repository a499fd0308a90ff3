"""This engine in sentence-transformers: python examples/st_encode.py MODEL_DIR OUTPUT_DIR"""

import sys

from sentence_transformers import SentenceTransformer

from llm2vec_fast import LLM2Vec
from llm2vec_fast.integrations.sentence_transformers import LLM2VecModule, load

model_dir, output = sys.argv[1:]
prompts = {"query": "Retrieve the sentence that answers the question: "}
module = LLM2VecModule(LLM2Vec.from_pretrained(model_dir))
SentenceTransformer(modules=[module], prompts=prompts).save_pretrained(output)

model = load(output)  # with its prompts
documents = [
    "Gzip compresses a file with the DEFLATE algorithm.",
    "A thread shares the memory of its process.",
]
query = model.encode_query("how do I make a file smaller?")
scores = model.similarity(query, model.encode_document(documents))[0]
for score, document in sorted(zip(scores.tolist(), documents, strict=True), reverse=True):
    print(f"{score:.3f}  {document}")
