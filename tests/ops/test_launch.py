"""The door to a kernel: what reaches it on a device, on meta tensors and with nothing to do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from llm2vec_fast import ops
from llm2vec_fast.ops import backend
from llm2vec_fast.ops.kernels.launch import as_rows, launch, power_of_2, recorded


class Spy:
    """Stands for a @triton.jit function: kernel[grid](*args, **options)."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options))


def test_a_kernel_gets_its_grid_arguments_and_options():
    spy, x = Spy(), torch.zeros(3)
    launch(spy, (2, 3), x, 7, BLOCK=16, num_warps=2)
    assert spy.calls == [((2, 3), (x, 7), {"BLOCK": 16, "num_warps": 2})]


def test_an_empty_grid_launches_nothing():
    spy = Spy()
    with recorded() as launches:
        launch(spy, (0,), torch.zeros(0))
        launch(spy, (4, 0), torch.zeros(0, device="meta"))
    assert not spy.calls and not launches


def test_meta_tensors_are_recorded_and_never_launched():
    spy, x = Spy(), torch.zeros(3, device="meta")
    launch(spy, (1,), x)
    with recorded() as outer, recorded() as inner:
        launch(spy, (5,), x, None, 2.5, BLOCK=8)
        launch(spy, (6,), torch.zeros(3))
    assert len(spy.calls) == 1  # the CPU tensor's
    for launches in (outer, inner):
        (found,) = launches
        assert found.kernel is spy and found.grid == (5,)
        assert found.args[1:] == (None, 2.5) and found.options == {"BLOCK": 8}
    launch(spy, (1,), x)
    assert len(outer) == 1


def test_meta_tensors_stand_for_the_asked_gpu():
    meta = torch.device("meta")
    before = backend.arch_of(meta)
    with recorded(80):
        assert backend.arch_of(meta) == 80
        with recorded(100):
            assert backend.arch_of(meta) == 100
        assert backend.arch_of(meta) == 80
    assert backend.arch_of(meta) == before


def test_an_operation_on_meta_tensors_records_forward_and_backward():
    x = torch.empty(5, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with ops.use("triton"), recorded() as launches:
        y = ops.swiglu(x)
        assert y.shape == (5, 32) and y.dtype == torch.bfloat16 and len(launches) == 1
        y.backward(torch.empty_like(y))
    assert len(launches) == 2 and x.grad.shape == x.shape


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 576, 1023, 1024, 1025])
def test_power_of_2(n):
    found = power_of_2(n)
    assert found >= max(n, 1) and found & (found - 1) == 0 and (found == 1 or found // 2 < n)


def test_as_rows_copies_only_where_it_must():
    x = torch.arange(48.0).view(4, 12)
    assert as_rows(x) is x
    wide = x[:, 2:8]
    assert as_rows(wide).data_ptr() == wide.data_ptr() and as_rows(wide).stride() == (12, 1)
    assert torch.equal(as_rows(x.t()), x.t()) and as_rows(x.t()).stride(1) == 1
    assert as_rows(x.view(2, 2, 12)).shape == (4, 12)
    assert as_rows(torch.zeros(2, 0, 8)).shape == (0, 8)


@pytest.mark.gpu
def test_a_kernel_runs_where_its_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(7, 64, device="cuda:1", dtype=torch.bfloat16)
    torch.testing.assert_close(ops.swiglu(x), ops.swiglu_ref(x))
