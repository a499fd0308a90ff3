"""What sentence-transformers' files beside a model say: E5-Mistral, Qwen3-Embedding and their like.

modules.json names the modules, 1_Pooling/config.json how vectors are pooled, sentence_bert_config
.json and the tokenizer how long texts may be, config_sentence_transformers.json the prompts.

Vectors are those of sentence-transformers, with two differences: an empty text is the zero vector,
and a special token's string in a text is text. An end token that tokenizer_config.json asks for
(`add_eos_token`: E5-Mistral) is added, as transformers did before version 5.

source: the layouts that sentence-transformers 2 to 6 write
"""

from __future__ import annotations

from pathlib import Path

from llm2vec_fast.model.small_file import read_json

MODULES = "modules.json"
POOLING = {
    "cls": "bos_token",
    "mean": "mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",  # whatever it is: an end token stands there if the tokenizer adds it
}
# Before version 6 there was a switch for each way of pooling.
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
RUNS = ("Transformer", "Pooling", "Normalize")


def read_layout(directory: Path, config: dict) -> dict:
    """Settings of a model that sentence-transformers runs with its own Transformer, in our names;
    {} where there is none.

    config:  of the model's config.json, which may say that attention goes both ways
    returns: pooling_mode, skip_instruction, max_length, doc_max_length, bidirectional, template
             and prompts, by name. Whether vectors are normalised is left to the caller.
    raises:  ValueError naming the file that cannot be read, or the module that this engine lacks
    """
    modules = _read(directory / MODULES, list)
    names = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules]
    if not names or names[0] != "Transformer":
        return {}
    for name in names:
        if name not in RUNS:
            raise ValueError(
                f"{directory / MODULES} has the module {name!r}, which would change the vectors: "
                f"of sentence-transformers' modules only {', '.join(RUNS)} run here"
            )
    pooling = next((m.get("path") for m in modules[1:] if "Pooling" in str(m.get("type"))), None)
    if pooling is not None and (Path(str(pooling)).name != pooling or pooling == ".."):
        raise ValueError(f"{directory / MODULES}: {pooling!r:.80} is no directory beside it")
    told = {} if pooling is None else _pooling(directory / pooling / "config.json")
    prompts = _read(directory / "config_sentence_transformers.json", dict).get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    longest = _max_length(directory, config)
    both_ways = config.get("is_causal") is False or config.get("use_bidirectional_attention")
    return told | {
        "max_length": longest,
        "doc_max_length": longest,
        "bidirectional": bool(both_ways),
        "template": "none",
        "prompts": {name: text for name, text in prompts.items() if isinstance(text, str)},
    }


def _pooling(path: Path) -> dict:
    told = _read(path, dict)
    modes = told.get("pooling_mode") or [mode for key, mode in SWITCHES.items() if told.get(key)]
    modes = [modes] if isinstance(modes, str) else modes
    mode = modes[0] if len(modes) == 1 else " + ".join(map(str, modes)) or "mean"
    whole = told.get("include_prompt", True)
    # Their weights count from the prompt on, ours from the text on.
    exact = whole or mode != "weightedmean"
    unknown = f"{mode}{'' if exact else ' without the prompt'} (of {path})"
    return {
        "pooling_mode": POOLING.get(mode, unknown) if exact else unknown,
        "skip_instruction": not whole,
    }


def _max_length(directory: Path, config: dict) -> int | None:
    told = _read(directory / "sentence_bert_config.json", dict).get("max_seq_length")
    if told:
        return told
    tokenizer = _read(directory / "tokenizer_config.json", dict).get("model_max_length")
    limits = (tokenizer, config.get("max_position_embeddings"))
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and limit > 0]
    return min(known, default=None)


def _read(path: Path, kind: type):
    """The JSON of a file, or an empty value of that kind where there is none."""
    try:
        told = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    rows = told if kind is list else [told]
    if not isinstance(told, kind) or not all(isinstance(row, dict) for row in rows):
        what = "list of objects" if kind is list else "object"
        raise ValueError(f"{path} must hold a JSON {what}")
    return told
