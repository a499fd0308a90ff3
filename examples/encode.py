"""Texts to vectors, and which document answers the question: python examples/encode.py MODEL_DIR"""

import sys

from llm2vec_fast import LLM2Vec

model = LLM2Vec.from_pretrained(sys.argv[1])
documents = [
    "Gzip compresses a file with the DEFLATE algorithm.",
    "A thread shares the memory of its process.",
]
instruction = "Retrieve the sentence that answers the question:"
query = model.encode([[instruction, "how do I make a file smaller?"]], normalize=True)
scores = (query @ model.encode(documents, normalize=True).T)[0]
for score, document in sorted(zip(scores.tolist(), documents, strict=True), reverse=True):
    print(f"{score:.3f}  {document}")
