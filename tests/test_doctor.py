"""doctor --gpu: what is wrong is said to be wrong. Its checks run here in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import doctor, ops
from llm2vec_fast.ops import _check
from llm2vec_fast.ops.backend import PREFERENCE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def findings():
    pytest.importorskip("triton")
    return list(_check.findings(CPU, [torch.float32], small=True))


def test_every_operation_is_checked_and_right(findings):
    assert {found.op for found in findings} == set(PREFERENCE)
    ran = {(found.op, found.backend) for found in findings if found.error is not None}
    for op, backends in PREFERENCE.items():
        if "triton" in backends:
            assert (op, "triton") in ran
    for found in findings:
        assert found.ok, found
        assert found.error is not None or found.reason


def test_a_wrong_kernel_is_seen(monkeypatch):
    """A kernel that is off by a tenth, and one that gives NaN."""
    right = ops.swiglu
    for wrong in (lambda x: 1.1 * right(x), lambda x: right(x) * float("nan")):
        monkeypatch.setattr(_check.ops, "swiglu", wrong)
        found = list(_check.findings(CPU, [torch.float32], small=True, only="swiglu"))
        assert any(f.error is not None for f in found)
        assert not any(f.ok for f in found if f.error is not None)


def test_a_crash_is_a_finding_not_an_end(monkeypatch):
    def crash(x):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(_check.ops, "swiglu", crash)
    found = list(_check.findings(CPU, [torch.float32], small=True, only="swiglu"))
    assert found and not any(f.ok for f in found) and "illegal" in found[0].reason


def test_without_a_gpu_nothing_is_called_right(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.check_kernels() is False
    assert "no CUDA GPU" in capsys.readouterr().out


def test_the_table_says_what_ran_and_what_did_not(monkeypatch, capsys):
    some = [
        _check.Finding("swiglu", "triton", "float32", 1e-7, 1e-4, None),
        _check.Finding("swiglu", "cuda", "float32", None, 1e-4, "is not built"),
    ]
    monkeypatch.setattr(_check, "findings", lambda *_: iter(some))
    assert doctor.check_kernels("cpu") is True
    told = capsys.readouterr().out
    assert "right" in told and "cuda did not run: is not built" in told
    some[0] = some[0]._replace(error=0.3)
    assert doctor.check_kernels("cpu") is False
    assert "WRONG" in capsys.readouterr().out
