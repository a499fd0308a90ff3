"""What a user writes for a model."""

from __future__ import annotations

import pytest

from llm2vec_fast.evaluate import ModelSpec, parse_specs


def test_a_name_alone_is_the_base():
    spec = ModelSpec.parse("org/some-model")
    assert spec == ModelSpec(base="org/some-model", label="some-model")


def test_all_fields():
    spec = ModelSpec.parse(
        "base=dir/m, adapter=a/one,adapter=a/two,causal=TRUE,pooling_mode=last_token,"
        "standardize=true,dtype=float32,max_length=64,labels=next_token,label=mine"
    )
    assert spec == ModelSpec(
        base="dir/m",
        label="mine",
        adapter=("a/one", "a/two"),
        causal=True,
        pooling_mode="last_token",
        max_length=64,
        dtype="float32",
        standardize=True,
        labels="next_token",
    )


def test_the_base_may_stand_first_without_its_name():
    spec = ModelSpec.parse("dir/m,causal=false")
    assert (spec.base, spec.causal) == ("dir/m", False)


def test_a_directory_whose_name_looks_like_fields(tmp_path):
    path = tmp_path / "run,lr=3e-5"
    path.mkdir()
    assert ModelSpec.parse(str(path)).base == str(path)


def test_the_label_tells_what_differs():
    texts = [
        "m",
        "m,causal=true",
        "m,causal=true,standardize=true",
        "m,adapter=a,labels=next_token",
    ]
    labels = [spec.label for spec in parse_specs(texts)]
    assert labels == ["m", "m, causal", "m, causal, standardized", "m + a, next_token"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base=m,casual=true", "no field 'casual'; did you mean 'causal'"),
        ("base=m,adaptor=x", "did you mean 'adapter'"),
        ("base=m,causal=yes", "causal must be true or false, got 'yes'"),
        ("base=m,max_length=many", "max_length must be a whole number, got 'many'"),
        ("base=m,labels=same", "labels must be same_token or next_token"),
        ("base=m,base=n", "base stands twice"),
        ("base=m,what", "'what' is not of the form"),
        ("causal=true", "name a directory"),
        ("base=m,adapter=", "name a directory"),
        ("", "name a directory"),
    ],
)
def test_what_is_wrong_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        ModelSpec.parse(text)


def test_labels_are_unique_and_there_is_a_model():
    with pytest.raises(ValueError, match="two models have the label 'm'"):
        parse_specs(["a/m", "b/m"])
    with pytest.raises(ValueError, match="no model"):
        parse_specs([])


def test_load_hands_everything_on(tiny_encoder):
    path = tiny_encoder().path
    text = f"base={path},causal=true,pooling_mode=last_token,max_length=32,dtype=float32"
    told = ModelSpec.parse(text).load("cpu").describe()
    assert told["dtype"] == "float32"
    wanted = {"enable_bidirectional": False, "pooling_mode": "last_token", "max_length": 32}
    assert told["settings"] | wanted == told["settings"]
    assert ModelSpec.parse(str(path)).load("cpu").describe()["settings"]["enable_bidirectional"]
