"""From a configuration to a trained adapter: `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from llm2vec_fast.corpus.lock import Locks
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model import adapt, weights
from llm2vec_fast.model.checkpoint import has_weights, write_json
from llm2vec_fast.model.source import Sources, absolute
from llm2vec_fast.model.work import matmul_rate
from llm2vec_fast.settings import (
    OFFICIAL,
    OFFICIAL_FILE,
    OWN_FILE,
    adapter_hashes,
    choose_device,
    choose_dtype,
    make_tokenizer,
    own_settings,
)
from llm2vec_fast.train.config import Config, as_json
from llm2vec_fast.train.data import Chunks, load_dataset_texts, read_texts
from llm2vec_fast.train.loop import RESOLVED, Loop, Summary
from llm2vec_fast.train.mntp import Mntp
from llm2vec_fast.train.optimizer import Optimizer
from llm2vec_fast.train.pairs import read_pairs
from llm2vec_fast.train.progress import Progress
from llm2vec_fast.train.ranks import ALONE, Ranks, local_device
from llm2vec_fast.train.shard import shard_base
from llm2vec_fast.train.simcse import SimCSE
from llm2vec_fast.train.supervised import Supervised
from llm2vec_fast.train.work import Objective

# Fields that a resumed run may change: they alter neither data nor arithmetic. Model and data are
# known by their content, not by where they lie.
FREE = {
    "model_name_or_path", "peft_model_name_or_path", "train_file", "dataset_file_path",
    "validation_file",
    "output_dir", "device", "logging_steps", "disable_tqdm", "save_strategy", "save_steps",
    "save_total_limit", "overwrite_output_dir", "resume_from_checkpoint", "eval_steps", "eval_file",
    "stop_after_n_steps",
}  # fmt: skip
Evaluate = Callable[[LLM2Vec], dict[str, float]]


def train(config: Config, evaluate: Evaluate | None = None) -> Summary:
    """Trains an adapter (or the whole model) and leaves it in config.output_dir.

    evaluate: figures of the model in training, logged every eval_steps and at the end. It is what
              reads config.eval_file: `train` itself knows no evaluation
    returns:  steps, tokens, seconds, loss. Interrupted or killed, the same call goes on from the
              newest checkpoint; on a CPU with the same losses, bit for bit
    raises:   ValueError for what a user can mend, TrainingError if the loss is not finite
    """
    refuse_impossible(config, evaluate)
    device = choose_device(local_device(config.device), None)
    ranks = Ranks.join(device)
    try:
        encoder = load_encoder(config, device, ranks)
        refuse_overwriting(config, encoder.sources)
        progress = Progress(ranks.rank == 0, not config.disable_tqdm)
        objective = make_objective(config, encoder, ranks, progress)
        with Locks(Path(config.output_dir)) as locks:
            if ranks.rank == 0:
                locks.take("training")
            return _loop(config, encoder, objective, ranks, progress, evaluate).run()
    finally:
        ranks.leave()


def refuse_impossible(config: Config, evaluate: Evaluate | None = None) -> None:
    """Raises ValueError for combinations that would train badly, before anything is loaded."""
    if config.eval_file and evaluate is None:
        raise ValueError(
            f"eval_file {config.eval_file!r} would not be read: give train() evaluate=lambda "
            "encoder: {'sts_spearman': llm2vec_fast.evaluate.sts_spearman(encoder, eval_file)}"
        )
    if config.torch_dtype == "float16":
        raise ValueError(
            "torch_dtype float16: small gradients would vanish; use bfloat16 or float32"
        )
    if config.fsdp and config.full_finetuning:
        raise ValueError("fsdp shards a frozen base: set full_finetuning or fsdp, not both")


def refuse_overwriting(config: Config, sources: Sources) -> None:
    """Raises ValueError if the output would change a model: one that this training reads, or one
    that would then be read together with the new adapter.
    """
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {config.output_dir!r} is a file: name a directory")
    read = (sources.base, sources.config.parent, sources.tokenizer, *sources.adapters)
    if output.resolve() in [path.resolve() for path in read]:
        raise ValueError(
            f"output_dir {config.output_dir!r} is a model that this training reads: choose another"
        )
    if has_weights(output) and not (config.full_finetuning and (output / RESOLVED).exists()):
        raise ValueError(
            f"output_dir {config.output_dir!r} holds a whole model, which would be lost or read "
            "together with what is trained: choose another"
        )


def load_encoder(config: Config, device: torch.device, ranks: Ranks = ALONE) -> LLM2Vec:
    """The base with its earlier adapters merged, and what is to be trained beside it."""
    sharded = config.fsdp and ranks.world > 1
    encoder = LLM2Vec.from_pretrained(
        config.model_name_or_path,
        config.peft_model_name_or_path or None,
        enable_bidirectional=config.bidirectional,
        pooling_mode=config.pooling_mode,
        max_length=config.max_seq_length,
        doc_max_length=config.max_seq_length,
        dtype=str(choose_dtype(config.torch_dtype, device)),
        device="cpu" if sharded else device,
        template=config.template,
    )
    if config.full_finetuning:
        encoder.model.requires_grad_(True)
    else:
        adapt.attach(
            encoder.model,
            config.lora_r,
            config.lora_alpha,
            config.lora_target_modules,
            config.seed,
        )
    if sharded:
        shard_base(encoder.model, device)
    return encoder


def make_objective(
    config: Config, encoder: LLM2Vec, ranks: Ranks, progress: Progress | None = None
) -> Objective:
    """Reads the data and builds the training of config.kind."""
    if config.kind == "supervised":
        examples = read_pairs(
            config.files,
            limit=config.max_train_samples,
            negatives_per_query=config.negatives_per_query,
        )
        supervised = Supervised(encoder, examples, config, ranks)
        if supervised.too_small and progress:
            progress.say(
                f"tasks with less than a batch are left out: {', '.join(supervised.too_small)}"
            )
        return supervised
    texts = _texts(config)
    if texts.n_empty and progress:
        progress.say(f"{texts.n_empty} empty texts are left out")
    if config.kind == "simcse":
        return SimCSE(encoder, [text.strip() for text in texts], config, ranks)
    texts, held_out = _held_out(config, list(texts))
    length, by_line = config.max_seq_length, config.line_by_line
    # The model's template, which is saved with the adapter, is for the texts to be encoded later.
    settings = encoder.settings | {"template": "none"}
    plain = make_tokenizer(encoder.sources, settings, encoder.model.config)
    chunks = Chunks.from_texts(texts, plain, length, by_line)
    aside = held_out and Chunks.from_texts(held_out, plain, length, by_line)
    if progress:
        what = "texts without a token to predict" if by_line else "tokens of the last, short chunk"
        progress.say(f"{chunks.n_tokens} tokens in {len(chunks)} chunks; {chunks.left_out} {what}")
    head = weights.head_of(encoder.sources.base, encoder.model)
    return Mntp(encoder, head, chunks, aside or None, config, ranks)


def _texts(config: Config):
    if config.files:
        return read_texts(
            config.files, text_column=config.text_column, limit=config.max_train_samples
        )
    return load_dataset_texts(
        config.dataset_name,
        config.dataset_config_name,
        text_column=config.text_column,
        limit=config.max_train_samples,
    )


def _held_out(config: Config, texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts to train on and those to look at: of a file of their own, or the last per cent."""
    held_out: list[str] = []
    if config.validation_file:
        held_out = list(read_texts(config.validation_file, text_column=config.text_column))
    elif config.validation_split_percentage:
        cut = max(1, len(texts) * config.validation_split_percentage // 100)
        texts, held_out = texts[:-cut], texts[-cut:]
        if not texts:
            raise ValueError(
                "validation_split_percentage sets the only training text aside: give more texts, "
                "or a validation_file"
            )
    return texts, held_out[: config.max_eval_samples]


def _loop(config, encoder, objective, ranks, progress, evaluate) -> Loop:
    named = encoder.model.named_parameters()
    optimizer = Optimizer(
        named,
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    if progress.shown:
        progress.rate = matmul_rate(encoder.model.config, encoder.dtype, encoder.device, 0.1)
    settled = {k: v for k, v in as_json(config).items() if k not in FREE}
    made_of = {
        **settled,
        "model": encoder.sources.fingerprint(),
        "data": objective.fingerprint,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "world_size": ranks.world,
    }
    for name in ("model", "data"):
        ranks.agree(f"the {name}", made_of[name])

    def figures() -> dict[str, float]:
        found = objective.evaluate()
        if evaluate is not None and (ranks.rank == 0 or config.fsdp):  # sharded: all take part
            found |= evaluate(encoder)
        ranks.wait()
        return found

    return Loop(
        config, objective, optimizer, ranks, encoder.device, made_of,
        lambda directory: save_model(config, encoder, directory, ranks), figures, progress,
    )  # fmt: skip


def how_to_load(config: Config) -> str:
    """The Python expression of the trained model: an adapter is nothing without those below it."""
    if config.full_finetuning:
        return f"LLM2Vec.from_pretrained({config.output_dir!r})"
    adapters = [*config.peft_model_name_or_path, config.output_dir]
    return f"LLM2Vec.from_pretrained({config.model_name_or_path!r}, {adapters!r})"


def save_model(config: Config, encoder: LLM2Vec, directory: Path, ranks: Ranks) -> None:
    """The adapter as PEFT and LLM2Vec.from_pretrained read it, or the whole model."""
    if ranks.rank:
        return
    if config.full_finetuning:
        encoder.save(directory, merge_before_save=True)
    else:
        base = absolute(config.model_name_or_path)  # readable from any working directory
        adapt.save(encoder.model, directory, base, dropout=config.lora_dropout)
    # max_seq_length bounds what is trained on, not what the encoder reads later.
    told = OFFICIAL | {"pooling_mode": encoder.settings["pooling_mode"]}
    write_json(told, directory / OFFICIAL_FILE)
    own = own_settings(encoder.settings)
    if encoder.sources.adapters:
        own["merged" if config.full_finetuning else "stacked_on"] = adapter_hashes(encoder.sources)
    write_json(own, directory / OWN_FILE)
