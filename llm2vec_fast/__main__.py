"""`python -m llm2vec_fast` is the command line (torchrun needs a module)."""

from llm2vec_fast.cli import main

main()
