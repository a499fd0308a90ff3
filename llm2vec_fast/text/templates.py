"""Chat templates of instruction-tuned models: found by name, or given as a string."""

from __future__ import annotations

from dataclasses import dataclass

PLACE = "{text}"
_LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
_INST = "[INST] {text} [/INST]"
_GEMMA = "<bos><start_of_turn>user\n{text}<end_of_turn>"
_QWEN2 = "<|im_start|>user\n{text}<|im_end|>"

# Exactly the models for which the official library has a template (llm2vec 0.2.3).
BY_NAME = {
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3,
    "mistralai/Mistral-7B-Instruct-v0.2": _INST,
    "meta-llama/Llama-2-7b-chat-hf": _INST,
    "google/gemma-2-9b-it": _GEMMA,
    "Qwen/Qwen2-1.5B-Instruct": _QWEN2,
    "Qwen/Qwen2-7B-Instruct": _QWEN2,
}


@dataclass(frozen=True)
class Template:
    """What stands before and after the text; both empty for a model without a template."""

    prefix: str = ""
    suffix: str = ""

    @classmethod
    def parse(cls, template: str | None) -> Template:
        """From a string with one `{text}`, the name of a known model, or "none" / None."""
        if isinstance(template, str):
            template = BY_NAME.get(template, template)
        if template is None or template == "none":
            return cls()
        if not isinstance(template, str) or template.count(PLACE) != 1:
            raise ValueError(
                f"template {template!r} must hold {PLACE!r} exactly once, be 'none', "
                f"or name one of: {', '.join(BY_NAME)}"
            )
        return cls(*template.split(PLACE))

    def __str__(self) -> str:
        return f"{self.prefix}{PLACE}{self.suffix}" if self.prefix or self.suffix else "none"


def find_template(*names: str | None) -> Template:
    """The template of the first name that is known, else none."""
    return Template.parse(next((name for name in names if name in BY_NAME), None))
