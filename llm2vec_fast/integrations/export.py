"""A model as other programs load it: transformers, official llm2vec, sentence-transformers, vLLM.

What each of them goes by, besides the merged weights:

    transformers 5         config.json: `is_causal` false makes attention go both ways
    official llm2vec       llm2vec_config.json; it makes attention go both ways itself
    sentence-transformers  modules.json and 1_Pooling, above transformers
    vLLM                   config.json: `architectures` and `is_causal`; how to pool stands in
                           `pooling` for LlamaBidirectionalModel, else in 1_Pooling. So says its
                           source; no test here has run it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.model.source import resolve
from llm2vec_fast.settings import DTYPES, as_names

# In the order and spelling of sentence-transformers before 6, which every version reads and vLLM
# takes the first true one of.
SWITCHES = {
    "pooling_mode_cls_token": ("bos_token",),
    "pooling_mode_mean_tokens": ("mean",),
    "pooling_mode_weightedmean_tokens": ("weighted_mean",),
    "pooling_mode_lasttoken": ("last_token", "eos_token"),
}


def export(model: LLM2Vec, directory: str | Path) -> list[str]:
    """Writes the merged model. It is built aside and renamed: the directory is whole or absent.

    directory: a new one, or empty
    returns:   what other programs do differently from this engine, a sentence each
    raises:    ValueError if something is in the directory, and for a model in fp8
    """
    directory = Path(directory).absolute()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{directory} is not empty: export into a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial")  # of an export that was killed
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save(partial, merge_before_save=True)
        _describe(model, partial)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return differences(model)


def saved_dtype(model: str, adapters: Sequence[str] = ()) -> str:
    """The dtype that a model's config.json names, "auto" if none that can be computed in."""
    told = json.loads(resolve(model, as_names(adapters)).config.read_text(encoding="utf-8"))
    name = told.get("dtype") or told.get("torch_dtype")
    return name if name in DTYPES else "auto"


def differences(model: LLM2Vec) -> list[str]:
    """What a program that only reads config.json and 1_Pooling does to a plain text otherwise."""
    tokenizer, mode = model.tokenizer, model.settings["pooling_mode"]
    (tokens,) = tokenizer(["a text"], [""])
    plain = [*tokenizer.start_ids, *tokenizer.ids_of("a text"), *tokenizer.end_ids]
    found = []
    if tokens.ids.tolist() != plain:
        around = model.settings["template"]
        what = "an end token" if around == "none" else f"the template {around!r}"
        found.append(f"sentence-transformers and vLLM do not put {what} around texts: do it there")
    if mode in ("mean", "weighted_mean") and tokens.start > 0:
        found.append(
            "sentence-transformers and vLLM pool the start token too, this engine and the official "
            "llm2vec do not: the vectors differ"
        )
    if mode == "weighted_mean":
        found.append("vLLM has no weighted mean")
    return found


def _describe(model: LLM2Vec, directory: Path) -> None:
    """Adds what the programs above go by to a model that was saved whole."""
    mode, limit = model.settings["pooling_mode"], model.settings["max_length"]
    names = ("Transformer", "Pooling")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, ("", "1_Pooling"), strict=True))
    ]
    write_json(modules, directory / "modules.json")
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": model.dimension}
    pooling |= {switch: mode in modes for switch, modes in SWITCHES.items()}
    pooling |= {"include_prompt": not model.settings["skip_instruction"]}  # behind the switches
    write_json(pooling, directory / "1_Pooling" / "config.json")
    told = {"max_seq_length": limit, "do_lower_case": False}
    write_json(told, directory / "sentence_bert_config.json")
    tokenizer = directory / "tokenizer_config.json"
    told = _read(tokenizer) if tokenizer.exists() else {}
    if told.get("eos_token") and not told.get("pad_token"):  # batches are padded everywhere else
        write_json(told | {"pad_token": told["eos_token"]}, tokenizer)
    if model.settings.get("verbatim_instruction"):
        prompts = {"prompts": model.settings["prompts"]}
        write_json(prompts, directory / "config_sentence_transformers.json")


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
