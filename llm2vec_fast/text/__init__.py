"""Text to token ids and pooled spans, and token ids to batches."""

from llm2vec_fast.text.official import OfficialTokenizer
from llm2vec_fast.text.pack import pack
from llm2vec_fast.text.templates import Template, find_template
from llm2vec_fast.text.tokenize import TextTokenizer, Tokens

__all__ = ["OfficialTokenizer", "Template", "TextTokenizer", "Tokens", "find_template", "pack"]
