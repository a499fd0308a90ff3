"""What the official library answered, kept as tests/data/official_golden.json.

`python -m benchmarks.official golden` asks it again. The file holds token ids and pooled spans with
a tiny tokenizer (made here, committed under tests/data/tiny_tokenizer) and with SmolLM2's, and the
first dimensions of SmolLM2's vectors. Without the model, the old answers about it are kept.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from benchmarks.official import ROOT, run_many
from llm2vec_fast.adapters import shipped

DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny_tokenizer"
GOLDEN = DATA / "official_golden.json"
MODEL_VARIABLE = "LLM2VEC_FAST_TEST_MODEL"
SPECIALS = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
SENTENCES = (
    "The ferry left the harbour before sunrise, and nobody on the pier waved.",
    "Given a question, retrieve the passages that answer the question.",
    "Represent this sentence for searching relevant passages in a library of old books.",
    "Water boils at one hundred degrees, but not on the top of a mountain.",
    "She said that she would write the letter in the morning; she wrote it in the evening.",
    "The user asked the system for the answer, and the system gave the answer to the user.",
    "A train of thought is not a train, and the station of the town was closed in the winter.",
    "Some of the children were reading, some were writing, and the others were singing songs.",
    "It isn't what we wanted; it's what we'll have, and they've been told that we're here.",
    "In the year 2024 there were 365 days and one more, which makes 366 days in all.",
    "Nothing is better than a short sentence. Nothing is worse than a long one without an end.",
    "Information about the weather: rain in the north, wind in the south, snow on the hills.",
)
WORDS = "the answer to the question is in the library "

# [instruction, text, how often the text is repeated]
TEXTS: list[tuple[str, str, int]] = [
    ("", "The ferry left the harbour.", 1),
    ("Given a question, retrieve passages that answer it:", "What is the weather like?", 1),
    ("  Represent this:  ", "  two spaces before, three after   ", 1),
    ("Represent this:", "\n a line\n\nand another\t", 1),
    ("", WORDS, 60),
    ("Represent this sentence:", WORDS, 60),
    ("Represent this:", WORDS, 3),
    ("", "long words " + "unquestionable" * 3 + " ", 12),
    ("", "字", 410),
    ("Represent this:", "base64Text/", 60),
    ("", "before!@#$%^&*()after", 1),
    ("Represent this:", "one !@#$%^&*() two !@#$%^&*() three", 1),
    ("an !@#$%^&*() instruction", "a text", 1),
    ("", "Ünïcödé: naïve café, 日本語のテキスト, Привет!", 1),
    ("Find:", "👩‍👩‍👧 family \u200bzero\u00a0width e\u0301 \ufeff", 1),
    ("", "a <s> b </s> c <unk> d", 1),
    ("Represent this:", "<|im_start|>user\nhi<|im_end|><|eot_id|>", 1),
    ("<s>[INST]", "[INST] hi [/INST]", 1),
    ("Represent this:", "", 1),
    ("", "", 1),
    ("", "   ", 1),
    ("Represent this:", " \n\t ", 1),
    (" ", "an instruction of a space", 1),
    ("Given a very long instruction that takes up the room of the text itself: " * 2, "tail", 1),
    ("", "a", 1),
    ("Represent this:", "isn't it? they've 2024 !?.,;:-_ (x)[y]{z}", 1),
    ("\t", "answer,(ferry,", 1),  # the span is longer than the sequence: officially a crash
    ("", "nul\0bell\a rtl \u202eabc\u202c", 1),
]  # fmt: skip
SMALL = {"max_length": 24, "doc_max_length": 16}
LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
TINY_CASES: list[dict] = [
    {},
    SMALL,
    SMALL | {"pooling_mode": "weighted_mean"},
    SMALL | {"pooling_mode": "last_token"},
    SMALL | {"pooling_mode": "eos_token"},
    SMALL | {"pooling_mode": "bos_token"},
    SMALL | {"skip_instruction": False},
    SMALL | {"skip_instruction": False, "pooling_mode": "weighted_mean"},
    {"name": LLAMA3, "max_length": 64, "doc_max_length": 48},
    SMALL | {"name": LLAMA3, "pooling_mode": "eos_token"},
    {"name": MISTRAL, "family": "mistral", "max_length": 64, "doc_max_length": 48},
    SMALL | {"name": MISTRAL, "family": "mistral", "pooling_mode": "eos_token"},
    SMALL | {"name": "Qwen/Qwen2-7B-Instruct", "family": "qwen2", "pooling_mode": "eos_token"},
    SMALL | {"name": "meta-llama/Meta-Llama-3-8B", "pooling_mode": "eos_token"},
]
SMOLLM2_TEXTS = [0, 1, 2, 3, 5, 8, 11, 13, 14, 16, 18, 25]
SMOLLM2_CASES: list[dict] = [{}, SMALL | {"pooling_mode": "eos_token"}]
INSTRUCTION = "Represent this sentence for searching relevant passages:"
VECTOR_TEXTS = (
    "The ferry left the harbour before sunrise.",
    "Water boils at one hundred degrees, but not on the top of a mountain.",
    "How do I bake bread without yeast?",
    "def add(a, b):\n    return a + b",
    "Übermorgen fährt der Zug nach München.",
    "今日は天気がいいですね。",
    "hello",
    "Nothing is better than a short sentence. " * 6,
)
VECTOR_CASES: list[dict] = [
    {"pooling_mode": "mean", "enable_bidirectional": True},
    {"pooling_mode": "weighted_mean", "enable_bidirectional": False},
    # The adapters that our training wrote, read by the official library; smollm2-135m-NAME.
    {"pooling_mode": "mean", "enable_bidirectional": True, "adapters": ["mntp"]},
    {
        "pooling_mode": "mean",
        "enable_bidirectional": True,
        "adapters": ["mntp", "simcse", "docstrings"],
    },
]
KEPT_DIMENSIONS = 16


def write(smollm2: Path | None) -> None:
    """Asks the official library everything again and writes the golden file."""
    if not (TINY / "tokenizer.json").exists():
        write_tiny_tokenizer(TINY)
    smollm2 = smollm2 or (
        Path(os.environ[MODEL_VARIABLE]) if MODEL_VARIABLE in os.environ else None
    )
    golden = {"texts": TEXTS, "tiny": _tokens(TINY, TINY_CASES, range(len(TEXTS)))}
    if smollm2:
        golden["smollm2"] = _tokens(smollm2, SMOLLM2_CASES, SMOLLM2_TEXTS)
        golden["vectors"] = _vectors(smollm2)
    else:
        old = json.loads(GOLDEN.read_text(encoding="utf-8"))
        golden |= {name: old[name] for name in ("smollm2", "vectors")}
        print(f"no --smollm2 and no {MODEL_VARIABLE}: its old answers are kept")
    GOLDEN.write_text(_layout(golden), encoding="utf-8")
    print(f"{GOLDEN.relative_to(ROOT)}: {GOLDEN.stat().st_size} bytes")


def _tokens(model: Path, cases: list[dict], which) -> list[dict]:
    rows = [[TEXTS[i][0], TEXTS[i][1] * TEXTS[i][2]] for i in which]
    asked = [{"action": "tokenize", "model": str(model), "rows": rows} | case for case in cases]
    return [
        {"settings": case, "rows": list(which), "ids": reply["ids"], "spans": reply["spans"]}
        for case, reply in zip(cases, run_many(asked), strict=True)
    ]


def _vectors(model: Path) -> list[dict]:
    """Alone (batch size 1), so that no padding has a part in it; also in fp64, which tells how far
    rounding alone moves the official vectors.
    """
    rows = [[i, text] for text in VECTOR_TEXTS for i in ("", INSTRUCTION)]
    base = {"action": "encode", "model": str(model), "rows": rows, "batch_size": 1, "threads": 2}
    out = []
    for case in VECTOR_CASES:
        adapters = [str(shipped(f"smollm2-135m-{name}")) for name in case.get("adapters", ())]
        asked = base | case | {"adapters": adapters}
        kinds = [asked | {"dtype": dtype} for dtype in ("float32", "float64")]
        got, true = (reply["vectors"] for reply in run_many(kinds))
        rounding = np.linalg.norm(got - true, axis=1) / np.linalg.norm(true, axis=1)
        first = [[_six(x) for x in row[:KEPT_DIMENSIONS]] for row in got]
        norms = [_six(x) for x in np.linalg.norm(got, axis=1)]
        told = {"first": first, "norms": norms, "rounding": _six(rounding.max())}
        out.append({"settings": case, "rows": rows} | told)
    return out


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def _layout(golden: dict) -> str:
    """JSON with one line for each text, case or model, so that a change can be read in a diff."""
    parts = []
    for name, items in golden.items():
        lines = [json.dumps(i, ensure_ascii=True, separators=(",", ":")) for i in items]
        parts.append(f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n]")
    return "{" + ",\n".join(parts) + "}\n"


def write_tiny_tokenizer(directory: Path, size: int = 500) -> None:
    """A byte-level BPE like Llama 3's, in a form that old and new `tokenizers` read alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIALS.index("<s>"))]
        ),
    ])  # fmt: skip
    told = json.loads(tokenizer.to_str())
    told["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in told["model"]["merges"]
    ]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", told), ("tokenizer_config.json", settings)):
        text = json.dumps(content, ensure_ascii=False, indent=None) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
