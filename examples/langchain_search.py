"""This engine in LangChain: python examples/langchain_search.py MODEL_DIR FILE

FILE has a document a line. Needs pip install 'llm2vec-fast[langchain]'.
"""

import sys
from pathlib import Path

from langchain_core.vectorstores import InMemoryVectorStore

from llm2vec_fast import LLM2Vec
from llm2vec_fast.integrations.langchain import LLM2VecEmbeddings

model_dir, source = sys.argv[1:]
embeddings = LLM2VecEmbeddings(
    LLM2Vec.from_pretrained(model_dir),
    query_instruction="Given a question, retrieve the passage that answers it:",
)
lines = Path(source).read_text(encoding="utf-8").splitlines()
store = InMemoryVectorStore.from_texts(lines, embeddings)
question = "how do I make a file smaller?"
for document, score in store.similarity_search_with_score(question, k=3):
    print(f"{score:.3f}  {document.page_content}")
