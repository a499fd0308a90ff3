"""The table that chooses backends: preference, forcing, reasons."""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops import backend

X = torch.zeros(2, 2)


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """Two ops over backends that refuse for known reasons; nothing forced before or after."""
    refusals = {
        "never": lambda call: "it is broken",
        "half": lambda call: None if call.dtype == torch.float16 else f"{call.dtype} is too wide",
        "no_grad": lambda call: "no backward" if call.needs_grad else None,
        "reference": lambda call: None,
    }
    monkeypatch.setattr(backend, "_REFUSALS", {})
    monkeypatch.setattr(
        backend,
        "PREFERENCE",
        {"one": ("never", "half", "no_grad", "reference"), "two": ("half", "reference")},
    )
    for name, refuses in refusals.items():
        backend.register(name, refuses)
    ops.use(None)
    yield refusals
    monkeypatch.undo()
    ops.use(None)


def test_the_first_that_does_not_refuse_wins():
    assert backend.choose("one", X) == "no_grad"
    assert backend.choose("one", X.half()) == "half"
    assert backend.choose("one", X.clone().requires_grad_()) == "reference"
    with torch.no_grad():
        assert backend.choose("one", X.clone().requires_grad_()) == "no_grad"
    assert backend.choose("two", X) == "reference"


def test_a_choice_is_remembered_per_kind_of_call(made_up, monkeypatch):
    asked = []
    monkeypatch.setitem(backend._REFUSALS, "never", lambda call: asked.append(call) or "no")
    for _ in range(3):
        backend.choose("one", X)
        backend.choose("one", torch.zeros(7))  # another size is the same kind
    assert len(asked) == 1
    for other in ({"dropout": True}, {"window": True}, {"head_dim": 8}):
        backend.choose("one", X, **other)
    assert len(asked) == 4
    assert asked[1].dropout and asked[2].window and asked[3].head_dim == 8


def test_use_as_a_context_manager_ends_with_the_block():
    with ops.use("reference"):
        assert backend.choose("one", X) == backend.choose("two", X.half()) == "reference"
        with ops.use("half", "two"):
            assert backend.choose("two", X.half()) == "half"
            assert backend.choose("one", X) == "reference"
        assert backend.choose("two", X.half()) == "reference"
    assert backend.choose("one", X) == "no_grad"
    with pytest.raises(ZeroDivisionError), ops.use("reference"):
        raise ZeroDivisionError
    assert backend.choose("one", X) == "no_grad"


def test_forcing_again_decides_but_once(made_up, monkeypatch):
    asked = []
    backend.register("half", lambda call: asked.append(call))
    for _ in range(3):
        with ops.use("half", "two"):
            assert backend.choose("two", X) == "half"
        assert backend.choose("one", X.half()) == "half"
    assert [call.forced for call in asked] == [True, False]
    backend.register("half", lambda call: "no longer")
    with ops.use("half", "two"), pytest.raises(RuntimeError, match="no longer"):
        backend.choose("two", X)


def test_use_as_a_call_holds_until_none():
    ops.use("reference", "one")
    assert backend.choose("one", X) == "reference"
    assert backend.choose("two", X.half()) == "half"
    ops.use("reference")
    assert backend.choose("two", X.half()) == "reference"
    ops.use(None, "one")
    assert backend.choose("one", X) == "no_grad"
    assert backend.choose("two", X.half()) == "reference"
    ops.use(None)
    assert backend.choose("two", X.half()) == "half"


def test_use_touches_only_ops_that_list_the_backend():
    ops.use("no_grad")
    assert backend.choose("one", X.half()) == "no_grad"
    assert backend.choose("two", X.half()) == "half"


def test_a_forced_backend_that_cannot_run_raises_its_reason():
    with ops.use("half", "one"):
        assert backend.choose("one", X.half()) == "half"
        with pytest.raises(RuntimeError, match=r"one.*half: torch.float32 is too wide"):
            backend.choose("one", X)
    with ops.use("never"), pytest.raises(RuntimeError, match="never: it is broken"):
        backend.choose("one", X)


def test_when_all_refuse_every_reason_is_told(monkeypatch):
    monkeypatch.setitem(backend._REFUSALS, "no_grad", lambda call: "tired")
    monkeypatch.setitem(backend._REFUSALS, "reference", lambda call: "gone")
    with pytest.raises(RuntimeError) as error:
        backend.choose("one", X)
    for told in ("never: it is broken", "half: torch.float32", "no_grad: tired", "reference: gone"):
        assert told in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'nope'.*any op.*half"):
        ops.use("nope")
    with pytest.raises(ValueError, match=r"'three'.*one, two"):
        ops.use("reference", "three")
    with pytest.raises(ValueError, match=r"'never'.*'two'"):
        ops.use("never", "two")
    with pytest.raises(ValueError, match=r"'three'.*one, two"):
        ops.available("three")
    assert backend.choose("one", X) == "no_grad"  # a refused call forces nothing


def test_available_gives_a_reason_for_every_refusal_in_order():
    assert list(ops.available("one").items()) == [
        ("never", "it is broken"),
        ("half", "torch.float32 is too wide"),
        ("no_grad", None),
        ("reference", None),
    ]
    assert ops.available("one", dtype=torch.float16)["half"] is None


def test_the_real_table_on_cpu(made_up, monkeypatch):
    monkeypatch.undo()
    for op, names in backend.PREFERENCE.items():
        told = ops.available(op)
        assert tuple(told) == names
        assert names[-1] == "reference" and told["reference"] is None
        assert all(reason is None or reason.strip() for reason in told.values())
        assert set(names) <= backend._REFUSALS.keys()
    told = ops.available("attention")
    assert all(
        "CUDA" in told[name] or "installed" in told[name] for name in ("flash_attn", "varlen")
    )
    assert told["sdpa"] is None
    assert backend.choose("attention", X) == next(name for name in told if told[name] is None)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"device": "cpu"}, "CUDA"),
        ({"arch": 75}, "7.5"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 264}, "264"),
        ({"head_dim": 20}, "20"),
        ({"dropout": True}, "dropout"),
        ({}, None),
    ],
)
def test_what_varlen_refuses(changed, reason):
    from llm2vec_fast.ops._flash import varlen_refuses

    good = {"op": "attention", "device": "cuda", "arch": 90, "dtype": torch.bfloat16}
    told = varlen_refuses(backend.Call(**good | {"head_dim": 128} | changed))
    assert told is None if reason is None else reason in told


def test_a_gradient_for_any_input_counts():
    wants, plain = X.clone().requires_grad_(), None
    assert backend.choose("one", X, X, plain) == "no_grad"
    assert backend.choose("one", X, wants, plain) == "reference"
    assert backend.choose("one", X, plain, wants) == "reference"
    with torch.no_grad():
        assert backend.choose("one", X, wants) == "no_grad"


GOOD = {"op": "swiglu", "device": "cuda", "arch": 90, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, None),
        ({"device": "cpu"}, "CUDA"),
        ({"device": "meta"}, "forced"),
        ({"device": "meta", "forced": True}, None),
        ({"arch": 75}, "7.5"),
        ({"dtype": torch.float64}, "float64"),
        ({"op": "swiglu_fp8"}, None),
        ({"op": "swiglu_fp8", "arch": 80}, "8.9"),
    ],
)
def test_what_triton_refuses(made_up, monkeypatch, changed, reason):
    monkeypatch.undo()
    told = backend._REFUSALS["triton"](backend.Call(**GOOD | changed))
    assert told is None if reason is None else reason in told


def test_triton_runs_on_the_cpu_only_if_interpreted_and_asked_for(made_up, monkeypatch):
    monkeypatch.undo()
    refuses = backend._REFUSALS["triton"]
    call = backend.Call("swiglu", "cpu", 0, torch.float32, forced=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refuses(call) is None and "CUDA" in refuses(call._replace(forced=False))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in refuses(call)


def test_triton_absent_is_a_reason(made_up, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backend._REFUSALS["triton"](backend.Call(**GOOD))
