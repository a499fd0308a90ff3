"""Templates: found by exact name, or parsed from a string with one {text}."""

from __future__ import annotations

import pytest

from llm2vec_fast.text.templates import BY_NAME, Template, find_template

# What llm2vec 0.2.3 puts around a text, by model name.
OFFICIAL = {
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": ("[INST] ", " [/INST]"),
    "meta-llama/Llama-2-7b-chat-hf": ("[INST] ", " [/INST]"),
    "google/gemma-2-9b-it": ("<bos><start_of_turn>user\n", "<end_of_turn>"),
    "Qwen/Qwen2-1.5B-Instruct": ("<|im_start|>user\n", "<|im_end|>"),
    "Qwen/Qwen2-7B-Instruct": ("<|im_start|>user\n", "<|im_end|>"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models_have_the_official_template(name):
    assert find_template(name) == Template(*OFFICIAL[name])
    assert Template.parse(name) == Template(*OFFICIAL[name])


def test_no_other_model_has_one():
    assert set(BY_NAME) == set(OFFICIAL)


@pytest.mark.parametrize("name", ["meta-llama/Meta-Llama-3-8B", "my/copy", "", "{text}", "none"])
def test_an_unknown_name_finds_none(name):
    assert find_template(name) == Template()


def test_the_first_known_name_wins_and_unknown_ones_are_passed_over():
    llama3, mistral = list(OFFICIAL)[:2]
    assert find_template(None, "", "my/copy", mistral, llama3) == Template(*OFFICIAL[mistral])
    assert find_template() == Template()


def test_own_template_is_split_at_its_place():
    template = Template.parse("Passage: {text}\n")
    assert (template.prefix, template.suffix) == ("Passage: ", "\n")


@pytest.mark.parametrize("given", [None, "none"])
def test_none_is_no_template(given):
    assert Template.parse(given) == Template("", "")


@pytest.mark.parametrize("given", ["", "no place", "{text} twice {text}", "my/copy", "{Text}"])
def test_a_template_without_exactly_one_place_is_refused(given):
    with pytest.raises(ValueError, match="exactly once"):
        Template.parse(given)


@pytest.mark.parametrize("given", [*BY_NAME.values(), "{text}!", "a {b} {text}", "none"])
def test_a_template_survives_being_saved_as_a_string(given):
    assert str(Template.parse(given)) == given
    assert Template.parse(str(Template.parse(given))) == Template.parse(given)


def test_a_template_of_the_text_alone_is_none():
    assert str(Template.parse("{text}")) == "none"
