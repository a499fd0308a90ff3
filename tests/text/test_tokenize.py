"""The default ("fixed") way from text to ids and pooled span, with three kinds of tokenizer:

tiny    byte-level BPE like Llama 3's, trimmed offsets, puts <s> in front (tests/data)
llama2  no pre-tokenizer, "▁" for spaces and one in front, byte fallback, like Llama 2's
smollm2 the real one: byte-level, offsets not trimmed, adds nothing
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm2vec_fast.text import Template, TextTokenizer, tokenize

TINY = Path(__file__).parent.parent / "data" / "tiny_tokenizer"
LLAMA3 = Template.parse("meta-llama/Meta-Llama-3-8B-Instruct")
INST = Template.parse("mistralai/Mistral-7B-Instruct-v0.2")
SPECIAL_TEXT = "a <s> b </s> <unk> <|im_start|>user <|eot_id|>"
PLAIN = [
    "The ferry left the harbour before sunrise, and nobody on the pier waved.",
    "  two spaces before, three after   ",
    "\n a line\n\nand\tanother\r\n",
    "isn't it? they've 2024 !?.,;:-_ (x)[y]{z}",
    "Ünïcödé: naïve café, 日本語のテキスト, Привет!",
    "👩‍👩‍👧 zero\u200bwidth no\u00a0break e\u0301 \ufeff x",
    "nul\0bell\a rtl \u202eabc\u202c \x7f",
    "a",
    ".",
    "base64" * 50,
]


def llama2_like(directory: Path) -> None:
    """Trained on a few sentences; tokens may hold several words' beginnings, but no second "▁"."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words = "the ferry and the answer: to the question, is in them? another than a man!? he.. she.."
    tokenizer.train_from_iterator([words, *PLAIN[:4], "the then there these he"] * 3, trainer)
    told = json.loads(tokenizer.to_str())
    told["added_tokens"] = [t for t in told["added_tokens"] if not t["content"].startswith("<0x")]
    told["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(told | {"pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.save(str(directory / "tokenizer.json"))
    write_settings(directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_settings(directory: Path, **settings) -> None:
    told = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="session")
def llama2(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama2")
    llama2_like(directory)
    return directory


@pytest.fixture(params=["tiny", "llama2", "smollm2"])
def directory(request) -> Path:
    return TINY if request.param == "tiny" else request.getfixturevalue(request.param)


@pytest.fixture
def copy_of_tiny(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path / "tiny")


def one(tokenizer: TextTokenizer, text: str, instruction: str = "") -> tokenize.Tokens:
    (tokens,) = tokenizer([text], [instruction])
    return tokens


def said(tokenizer: TextTokenizer, ids) -> str:
    return tokenizer.raw.decode(list(map(int, ids)), skip_special_tokens=False)


def specials_in(tokenizer: TextTokenizer, ids) -> list[int]:
    special = {i for i, t in tokenizer.raw.get_added_tokens_decoder().items() if t.special}
    return [i for i in map(int, ids) if i in special]


# --- ids ---


def test_plain_text_has_the_ids_of_auto_tokenizer(directory):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    ours = TextTokenizer(directory)(PLAIN, [""] * len(PLAIN))
    assert [t.ids.tolist() for t in ours] == theirs(PLAIN)["input_ids"]
    assert all(t.ids.dtype == "int32" for t in ours)


def test_instruction_and_text_are_tokenised_together(directory):
    tokenizer = TextTokenizer(directory)
    tokens = one(tokenizer, "the answer", "  Find: ")
    assert tokens.ids.tolist() == tokenizer.raw.encode("Find: the answer").ids


def test_many_at_once_are_as_one_by_one(directory):
    tokenizer = TextTokenizer(directory, template=INST, max_length=40, doc_max_length=30)
    texts = [*PLAIN, "", " ", SPECIAL_TEXT, "word " * 500, "字" * 2000]
    instructions = ["", "Find:", "Represent this: "] * 5
    together = tokenizer(texts, instructions)
    for text, instruction, tokens in zip(texts, instructions, together, strict=True):
        alone = one(tokenizer, text, instruction)
        assert alone.ids.tolist() == tokens.ids.tolist()
        assert (alone.start, alone.end, alone.status, alone.note) == (
            tokens.start, tokens.end, tokens.status, tokens.note,
        )  # fmt: skip


def test_texts_and_instructions_must_pair_up():
    with pytest.raises(ValueError):
        TextTokenizer(TINY)(["a", "b"], [""])


@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000", " " * 100_000])
@pytest.mark.parametrize("instruction", ["", "Find:"])
@pytest.mark.parametrize("template", [Template(), LLAMA3, INST])
def test_an_empty_text_has_no_ids(text, instruction, template):
    tokens = one(TextTokenizer(TINY, template=template), text, instruction)
    assert (len(tokens), tokens.start, tokens.end, tokens.status) == (0, 0, 0, "empty")


def test_a_text_that_the_tokenizer_drops_is_empty_and_says_so(copy_of_tiny):
    told = json.loads((copy_of_tiny / "tokenizer.json").read_text())
    told["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (copy_of_tiny / "tokenizer.json").write_text(json.dumps(told))
    for template in (Template(), INST):
        for instruction in ("", "Find:"):
            # Alone, and so often that a first look at the beginning sees nothing else.
            for text in ("~", "~" * 9000):
                tokenizer = TextTokenizer(copy_of_tiny, template=template)
                tokens = one(tokenizer, text, instruction)
                assert (len(tokens), tokens.status) == (0, "empty")
                assert "normalisation" in tokens.note
                assert "hello" in said(tokenizer, one(tokenizer, text + "hello", instruction).ids)


def test_start_and_end_tokens_follow_the_flags_of_llama_tokenizers(copy_of_tiny):
    def ids_with(**flags):
        write_settings(copy_of_tiny, bos_token="<s>", eos_token="</s>", **flags)
        tokenizer = TextTokenizer(copy_of_tiny)
        return tokenizer.raw.decode(one(tokenizer, "the").ids.tolist(), skip_special_tokens=False)

    llama = {"tokenizer_class": "LlamaTokenizer"}
    assert ids_with(**llama) == "<s>the"
    assert ids_with(**llama, add_bos_token=False) == "the"
    assert ids_with(**llama, add_bos_token=True, add_eos_token=True) == "<s>the</s>"
    assert ids_with(add_bos_token=False) == "<s>the"  # other classes go by tokenizer.json


def test_flags_without_the_token_they_mean_change_nothing(copy_of_tiny):
    flags = {"add_bos_token": True, "add_eos_token": True}
    write_settings(copy_of_tiny, tokenizer_class="LlamaTokenizer", **flags)
    tokenizer = TextTokenizer(copy_of_tiny)
    assert said(tokenizer, one(tokenizer, "the").ids) == "<s>the"


def test_special_tokens_written_as_objects_are_read(copy_of_tiny):
    write_settings(copy_of_tiny, bos_token={"content": "<s>"}, eos_token={"content": "</s>"})
    tokenizer = TextTokenizer(copy_of_tiny, pooling_mode="eos_token")
    assert said(tokenizer, one(tokenizer, "the").ids) == "<s>the</s>"


# --- spans ---


@pytest.mark.parametrize("text", ["the answer", "(x)", "日本語", "2024", "ferry  and ferry"])
def test_start_tokens_and_instruction_are_not_pooled(directory, text):
    tokenizer = TextTokenizer(directory)
    tokens = one(tokenizer, text, "Find the answer:")
    assert tokens.end == len(tokens)
    # The space between them goes into the text's first token, where the tokenizer makes it one.
    assert said(tokenizer, tokens.ids[tokens.start :]).strip() == text
    before = said(tokenizer, tokens.ids[len(tokenizer.start_ids) : tokens.start])
    assert before.strip() == "Find the answer:"


@pytest.mark.parametrize("kind", ["tiny", "llama2", "smollm2"])
def test_a_token_across_the_boundary_counts_as_text(kind, request):
    directory = TINY if kind == "tiny" else request.getfixturevalue(kind)
    tokenizer = TextTokenizer(directory)
    tokens = one(tokenizer, "the end", "Find:")
    assert tokenizer.raw.id_to_token(int(tokens.ids[tokens.start])) in ("Ġthe", "▁the")


def test_without_instruction_the_whole_text_is_pooled(directory):
    tokenizer = TextTokenizer(directory)
    for text in PLAIN:
        tokens = one(tokenizer, text)
        assert (tokens.start, tokens.end) == (len(tokenizer.start_ids), len(tokens))


@given(instruction=st.text(max_size=12), text=st.text(max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_span_begins_at_the_first_token_that_reaches_into_the_text(instruction, text):
    check_boundary(BYTE_LEVEL, instruction, text)


SPACES = st.text(alphabet=" \n\tthe.(é字", max_size=8)


@given(instruction=SPACES, text=SPACES)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_span_begins_right_among_spaces(instruction, text):
    check_boundary(BYTE_LEVEL, instruction, text)


BYTE_LEVEL = TextTokenizer(TINY)


def check_boundary(tokenizer: TextTokenizer, instruction: str, text: str) -> None:
    """Byte-level tokens are as many bytes as their strings have characters: so, count bytes."""
    tokens = one(tokenizer, text, instruction)
    if not len(tokens):
        assert not text.strip()
        return
    assert tokens.end == len(tokens)
    lead = f"{instruction.strip()} ".encode() if instruction.strip() else b""
    sizes = [len(tokenizer.raw.id_to_token(int(i))) for i in tokens.ids]
    before = sum(sizes[len(tokenizer.start_ids) : tokens.start])
    assert before <= len(lead) < before + sizes[tokens.start]


@pytest.mark.parametrize("template", [INST, LLAMA3, Template("<|im_start|>user\n", "<|im_end|>")])
@pytest.mark.parametrize("instruction", ["", "Find:"])
def test_the_template_goes_around_and_its_suffix_is_pooled(template, instruction):
    tokenizer = TextTokenizer(TINY, template=template)
    tokens = one(tokenizer, "  the answer ", instruction)
    lead = f"{instruction} " if instruction else ""
    whole = f"<s>{template.prefix}{lead}the answer{template.suffix}"
    assert said(tokenizer, tokens.ids) == whole
    assert tokens.end == len(tokens)
    assert said(tokenizer, tokens.ids[tokens.start :]).lstrip(" ") == "the answer" + template.suffix
    # Exactly what Hugging Face's tokenizer makes of the dressed string.
    fresh = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokens.ids.tolist() == fresh.encode(whole.removeprefix("<s>")).ids


def test_a_template_in_plain_characters_with_a_llama2_tokenizer(llama2):
    tokenizer = TextTokenizer(llama2, template=INST)
    tokens = one(tokenizer, "the answer", "Find:")
    assert tokens.ids.tolist() == tokenizer.raw.encode("[INST] Find: the answer [/INST]").ids
    assert said(tokenizer, tokens.ids[tokens.start : tokens.end]) == "the answer [/INST]"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("prefix", ["<s>", "<s>user\n", "<s>[INST] ", "user "])
def test_spaces_put_in_front_are_those_of_the_whole_string(llama2, tmp_path, scheme, prefix):
    """Newer LLaMA tokenizers put "▁" before the first piece of a text only, not behind <s>."""
    told = json.loads((llama2 / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(told | {"normalizer": None}))
    tokenizer = TextTokenizer(tmp_path, template=Template(prefix, " end</s>.the"))
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the answer", "(x)"):
        expected = whole.encode(f"{prefix}{text} end</s>.the").ids
        assert one(tokenizer, text).ids.tolist() == expected


@pytest.mark.parametrize("template", [Template(), INST, LLAMA3])
def test_skip_instruction_false_pools_everything(template):
    tokenizer = TextTokenizer(TINY, template=template, skip_instruction=False)
    tokens = one(tokenizer, "the answer", "Find:")
    assert (tokens.start, tokens.end) == (0, len(tokens))


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token", "eos_token"])
@pytest.mark.parametrize("skip", [True, False])
def test_spans_do_not_depend_on_the_mode_but_for_the_end_token(mode, skip):
    options = {"skip_instruction": skip, "max_length": 12}
    mean = one(TextTokenizer(TINY, **options), "the answer", "Find:")
    tokens = one(TextTokenizer(TINY, pooling_mode=mode, **options), "the answer", "Find:")
    extra = [BYTE_LEVEL.eos_id] if mode == "eos_token" else []
    assert tokens.ids.tolist() == mean.ids.tolist() + extra
    assert (tokens.start, tokens.end) == (mean.start, mean.end + len(extra))


def test_the_end_token_is_not_added_twice(copy_of_tiny):
    template = Template("", "</s>")
    tokenizer = TextTokenizer(TINY, template=template, pooling_mode="eos_token")
    assert said(tokenizer, one(tokenizer, "the").ids) == "<s>the</s>"
    write_settings(
        copy_of_tiny, tokenizer_class="LlamaTokenizer", eos_token="</s>", add_eos_token=True
    )
    tokenizer = TextTokenizer(copy_of_tiny, pooling_mode="eos_token")
    assert said(tokenizer, one(tokenizer, "the").ids) == "<s>the</s>"


def test_eos_pooling_without_an_end_token_is_refused(copy_of_tiny):
    write_settings(copy_of_tiny, bos_token="<s>")
    with pytest.raises(ValueError, match="eos_token"):
        TextTokenizer(copy_of_tiny, pooling_mode="eos_token")


@pytest.mark.parametrize("template", [Template(), INST, LLAMA3])
def test_bos_pooling_begins_at_the_bos(template):
    tokenizer = TextTokenizer(TINY, template=template, pooling_mode="bos_token")
    tokens = one(tokenizer, "the <s> answer", "Find:")
    assert tokens.start == 0 and tokens.ids[0] == tokenizer.bos_id


def test_bos_pooling_is_refused_where_the_tokenizer_adds_none(copy_of_tiny, llama2):
    told = json.loads((copy_of_tiny / "tokenizer.json").read_text())
    (copy_of_tiny / "tokenizer.json").write_text(json.dumps(told | {"post_processor": None}))
    for directory in (copy_of_tiny, llama2):
        with pytest.raises(ValueError, match="bos_token"):
            TextTokenizer(directory, pooling_mode="bos_token")


# --- truncation ---


@pytest.mark.parametrize("mode", ["mean", "eos_token"])
@pytest.mark.parametrize("template", [Template(), INST, LLAMA3])
@pytest.mark.parametrize("instruction", ["", "Find the answer:"])
def test_only_tokens_of_the_text_are_dropped(directory, template, instruction, mode):
    limits = {"max_length": 90, "pooling_mode": mode, "template": template}
    tokenizer = TextTokenizer(directory, doc_max_length=90, **limits)
    text = "the answer to the question is in the library, " * 20
    tokens = one(tokenizer, text, instruction)
    whole = one(TextTokenizer(directory, max_length=9999, doc_max_length=9999, template=template,
                              pooling_mode=mode), text, instruction)  # fmt: skip
    assert whole.status == "ok" and whole.start == tokens.start
    assert (len(tokens), tokens.end, tokens.status) == (90, 90, "truncated")
    ending = [tokenizer.eos_id] if mode == "eos_token" else []
    kept = 90 - tokens.start - len(tokenizer.tail_ids) - len(tokenizer.foot_ids)
    assert tokens.ids[: tokens.start + kept].tolist() == whole.ids[: tokens.start + kept].tolist()
    assert said(tokenizer, tokens.ids).endswith(template.suffix + said(tokenizer, ending))
    assert tokens.note.startswith(f"{kept} of ")


def test_doc_max_length_caps_the_text_alone():
    tokenizer = TextTokenizer(TINY, doc_max_length=5)
    text = "(" * 8
    tokens = one(tokenizer, text, "Find:")
    assert (tokens.end - tokens.start, tokens.status, tokens.note) == (
        5,
        "truncated",
        "5 of 8 tokens",
    )
    assert one(tokenizer, "(" * 5, "Find:").status == "ok"


def test_exactly_max_length_is_not_truncated():
    for limit, status in ((7, "ok"), (6, "truncated")):
        tokens = one(TextTokenizer(TINY, max_length=limit), "(" * 6)
        assert (len(tokens), tokens.status) == (limit, status)


def test_an_instruction_without_room_for_text_is_refused():
    tokenizer = TextTokenizer(TINY, max_length=6)
    assert len(one(tokenizer, "((", "(((")) == 6  # <s> ( ( ( " (" (
    with pytest.raises(ValueError, match="max_length = 6"):
        one(tokenizer, "((", "((((((")
    with pytest.raises(ValueError, match="no room"):
        one(TextTokenizer(TINY, max_length=6, template=LLAMA3), "((", "")
    assert one(tokenizer, "", "((((((").status == "empty"


def test_a_long_text_without_spaces_is_not_emptied(directory):
    tokenizer = TextTokenizer(directory)
    for text in ("字" * 1000, "QmFzZTY0" * 400):
        tokens = one(tokenizer, text)
        assert tokens.status == "truncated" and tokens.end - tokens.start == 400


@pytest.mark.parametrize("text", ["t", "th", "a"])
def test_a_text_that_becomes_one_token_with_the_template_is_not_empty(llama2, text):
    tokenizer = TextTokenizer(llama2, template=Template("", {"t": "he", "th": "e", "a": "n"}[text]))
    tokens = one(tokenizer, text)
    assert len(tokens) == 1, "meant to be a single token"
    assert (tokens.start, tokens.end, tokens.status) == (0, 1, "ok")


def test_the_suffix_of_a_truncated_text_is_whole_though_it_merges_with_letters(llama2):
    for suffix in ("n", "nswer", " then", "..", "!?"):
        tokenizer = TextTokenizer(llama2, template=Template("", suffix), doc_max_length=3)
        tokens = one(tokenizer, "(" * 9)
        assert tokens.status == "truncated"
        assert said(tokenizer, tokens.ids).endswith("(" + suffix)


def test_max_length_holds_though_the_suffix_is_longer_behind_this_text(tmp_path):
    vocab = {piece: i for i, piece in enumerate(["a", "s", "t", "h", "i", "st", "th", "thi"])}
    merges = [("s", "t"), ("t", "h"), ("th", "i")]
    Tokenizer(models.BPE(vocab, merges)).save(str(tmp_path / "tokenizer.json"))
    bare = TextTokenizer(tmp_path)
    template = Template("", "thi")  # one token behind "a", but "st", "h", "i" behind "s"
    roomy = one(TextTokenizer(tmp_path, template=template, max_length=6), "aaas")
    assert said(bare, roomy.ids).split() == "a a a st h i".split()
    tokens = one(TextTokenizer(tmp_path, template=template, max_length=5), "aaas")
    assert said(bare, tokens.ids).split() == "a a a thi".split()
    assert (tokens.status, tokens.note) == ("truncated", "3 of 4 tokens")


PIECES = st.lists(st.sampled_from([*"thean.!字( \n", "the", "then", ".."]))


@given(
    text=PIECES.map("".join),
    instruction=st.sampled_from(["", "the", "Find: a", "t."]),
    prefix=st.sampled_from(["", "the", "[INST] ", "t", "\n"]),
    suffix=st.sampled_from(["", "he", "n", " [/INST]", "..", "t.h"]),
    limits=st.tuples(st.integers(12, 40), st.integers(1, 40)),
    eos=st.booleans(),
)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_limits_and_spans_hold_for_any_text_and_template(
    llama2, text, instruction, prefix, suffix, limits, eos
):
    mode = "eos_token" if eos else "mean"
    for directory in (llama2, TINY):
        tokenizer = TextTokenizer(
            directory, template=Template(prefix, suffix), max_length=limits[0],
            doc_max_length=limits[1], pooling_mode=mode,
        )  # fmt: skip
        try:
            tokens = one(tokenizer, text, instruction)
        except ValueError as error:
            assert "no room" in str(error)
            continue
        if not text.strip():
            assert len(tokens) == 0
            continue
        assert 0 <= tokens.start < tokens.end == len(tokens) <= limits[0]
        assert tokens.status in ("ok", "truncated") and bool(tokens.note) == (tokens.status != "ok")
        words = said(tokenizer, tokens.ids[len(tokenizer.start_ids) :])
        assert words.endswith(suffix + "</s>" * eos)
        if tokens.status == "ok":
            lead = f"{instruction} " if instruction else ""
            inner = text.strip() if prefix or suffix else text
            assert words == prefix + lead + inner + suffix + "</s>" * eos


# --- long documents ---


def unclipped(tokenizer: TextTokenizer, text: str, instruction: str = "") -> tokenize.Tokens:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "CHARS_PER_TOKEN", 10**9)
        return one(tokenizer, text, instruction)


def clipped_hard(tokenizer: TextTokenizer, text: str, instruction: str = "") -> tokenize.Tokens:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "CHARS_PER_TOKEN", 1)
        return one(tokenizer, text, instruction)


LONG = {
    "words": "the answer to the question is in the library " * 400,
    "no spaces": "QmFzZTY0QUJD" * 900,
    "one letter": "a" * 9000,
    "cjk": "日本語の文章。" * 900,
    "emoji": "👩‍👩‍👧" * 900,
    "spaces": " " * 9000 + "end",
    "lines": "\n" * 5000 + "the end\n" * 500,
    "dots": "..!?" * 2000,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("template", [Template(), INST])
def test_a_clipped_text_has_the_ids_of_the_whole_one_cut(directory, kind, template):
    tokenizer = TextTokenizer(directory, max_length=48, doc_max_length=40, template=template)
    for instruction in ("", "Find:"):
        whole = unclipped(tokenizer, LONG[kind], instruction)
        for tokens in (
            one(tokenizer, LONG[kind], instruction),
            clipped_hard(tokenizer, LONG[kind], instruction),
        ):
            assert tokens.ids.tolist() == whole.ids.tolist()
            assert (tokens.start, tokens.end) == (whole.start, whole.end)
            assert tokens.status == whole.status
            stripped = template is INST and kind == "spaces"
            assert tokens.status == ("ok" if stripped else "truncated")


REPEATED = st.tuples(st.text(alphabet="ab the(字 \n.", min_size=1, max_size=6), st.integers(1, 90))


@given(parts=st.lists(REPEATED, max_size=4), instruction=st.sampled_from(["", "the a:"]))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_clipping_never_shows(llama2, parts, instruction):
    text = "".join(part * times for part, times in parts)
    for directory in (TINY, llama2):
        tokenizer = TextTokenizer(directory, max_length=20)
        whole, tokens = (
            unclipped(tokenizer, text, instruction),
            clipped_hard(tokenizer, text, instruction),
        )
        assert tokens.ids.tolist() == whole.ids.tolist()
        assert (tokens.start, tokens.end, tokens.status) == (whole.start, whole.end, whole.status)


def test_a_text_after_much_whitespace_is_not_empty():
    tokens = one(BYTE_LEVEL, " " * 20_000 + "hello")
    assert tokens.status == "truncated" and tokens.end - tokens.start == 400
    template = TextTokenizer(TINY, template=INST)
    assert one(template, " " * 20_000 + "hello").ids.tolist() == one(template, "hello").ids.tolist()


@pytest.mark.parametrize("piece", ["the answer ", "x", "字", " ", "\u200b"])
def test_fifty_megabytes_take_bounded_time(piece):
    text = piece * (50_000_000 // len(piece.encode())) + "end"
    started = time.perf_counter()
    tokens = one(BYTE_LEVEL, text, "Find:")
    assert time.perf_counter() - started < 2
    assert tokens.status == "truncated" and "more than" in tokens.note
    assert tokens.ids.tolist() == one(BYTE_LEVEL, piece * 3000 + "end", "Find:").ids.tolist()


# --- hostile text ---


@pytest.mark.parametrize("template", [Template(), LLAMA3])
@pytest.mark.parametrize("instruction", ["", "Find </s>:"])
def test_special_tokens_in_a_text_are_plain_characters(template, instruction):
    tokenizer = TextTokenizer(TINY, template=template)
    tokens = one(tokenizer, SPECIAL_TEXT, instruction)
    around = [*tokenizer.head_ids, *tokenizer.foot_ids]
    assert sorted(specials_in(tokenizer, tokens.ids)) == sorted(specials_in(tokenizer, around))
    assert (
        said(tokenizer, tokens.ids[tokens.start : len(tokens) - len(tokenizer.foot_ids)]).lstrip(
            " "
        )
        == SPECIAL_TEXT
    )


def test_special_tokens_in_a_text_with_the_other_tokenizers(llama2, smollm2):
    for directory in (llama2, smollm2):
        tokenizer = TextTokenizer(directory)
        for text in ("<s>", "a </s> b", "<|im_end|>", "<unk>", "<|endoftext|>"):
            tokens = one(tokenizer, text)
            assert not specials_in(tokenizer, tokens.ids)
            assert said(tokenizer, tokens.ids) == text


def test_the_official_separator_in_a_text_does_no_harm(directory):
    tokenizer = TextTokenizer(directory)
    text = "one !@#$%^&*() two !@#$%^&*() three"
    tokens = one(tokenizer, text, "Find:")
    assert said(tokenizer, tokens.ids[tokens.start :]).strip() == text


def test_lone_surrogates_are_replaced(directory):
    tokenizer = TextTokenizer(directory)
    for text, same in (
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("end\udbff", "end\ufffd"),
        ("\ud83d\ude00 pair", "😀 pair"),
        ("\ufeffbom \ud800", "\ufeffbom \ufffd"),
    ):
        assert one(tokenizer, text).ids.tolist() == one(tokenizer, same).ids.tolist()
        assert one(tokenizer, "x", text).ids.tolist() == one(tokenizer, "x", same).ids.tolist()


@pytest.mark.parametrize(
    "text", ["nul\0nul", "\0", "\u202eabc\u202c", "שלום עולם", "👩‍👩‍👧", "e\u0301\u0323", "\u200b"]
)
def test_odd_characters_survive(directory, text):
    tokenizer = TextTokenizer(directory)
    tokens = one(tokenizer, text, "Find:")
    assert tokens.status == "ok"
    assert said(tokenizer, tokens.ids[tokens.start :]).removeprefix(" ") == text


# --- files ---


def test_broken_files_are_named(copy_of_tiny):
    (copy_of_tiny / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold"):
        TextTokenizer(copy_of_tiny)
    (copy_of_tiny / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        TextTokenizer(copy_of_tiny)
    (copy_of_tiny / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer"):
        TextTokenizer(copy_of_tiny)


def test_truncation_and_padding_saved_in_tokenizer_json_are_not_obeyed(copy_of_tiny):
    told = json.loads((copy_of_tiny / "tokenizer.json").read_text())
    told["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    told["padding"] = {
        "strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    (copy_of_tiny / "tokenizer.json").write_text(json.dumps(told))
    tokens = one(TextTokenizer(copy_of_tiny), PLAIN[0])
    assert tokens.ids.tolist() == one(BYTE_LEVEL, PLAIN[0]).ids.tolist()


def test_without_tokenizer_json_transformers_makes_it(copy_of_tiny):
    told = json.loads((copy_of_tiny / "tokenizer.json").read_text())
    (copy_of_tiny / "tokenizer.json").unlink()
    (copy_of_tiny / "vocab.json").write_text(json.dumps(told["model"]["vocab"]))
    lines = ["#version: 0.2", *told["model"]["merges"]]
    (copy_of_tiny / "merges.txt").write_text("\n".join(lines) + "\n")
    write_settings(copy_of_tiny, tokenizer_class="GPT2Tokenizer", eos_token="</s>")
    tokens = one(TextTokenizer(copy_of_tiny), PLAIN[0])
    assert tokens.ids.tolist() == one(BYTE_LEVEL, PLAIN[0]).ids.tolist()[1:]


def test_a_pickled_copy_gives_the_same_ids():
    """Special tokens in a text stay literal in worker processes, too."""
    import pickle

    tokenizer = TextTokenizer(TINY)
    copy = pickle.loads(pickle.dumps(tokenizer))
    (here,), (there,) = (one(["a </s> b"], [""]) for one in (tokenizer, copy))
    assert here.ids.tolist() == there.ids.tolist()
