"""What an operation costs the host before its kernel starts, in microseconds a call.

    python -m benchmarks.dispatch --write

Everything of a call runs but the launch itself: checks, choice of backend, autograd node, output
allocation. On a machine without a GPU tensors lie on the CPU (an allocation costs about as much
there) and Triton is made to think that it may run there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import write_rows
from llm2vec_fast import ops
from llm2vec_fast.ops import backend


def microseconds(run: Callable[[], object], calls: int = 300, rounds: int = 15) -> float:
    """Of the best round: a neighbour can only make it slower."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, time.perf_counter() - began)
    return 1e6 * best / calls


def operations(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) on inputs of a 1.3B's shape, few tokens: only the host's work is seen."""
    T, D, N, K, H = 64, 2048, 16, 16, 128

    def draw(*shape):
        return torch.randn(shape, device=device).bfloat16()

    x, residual, weight, gate_up = draw(T, D), draw(T, D), draw(D), draw(T, 2 * D)
    qkv, table = draw(T, (N + 2 * K) * H), torch.rand(T, H // 2, device=device)
    positions = torch.arange(T, device=device, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 10, T], device=device, dtype=torch.int32)
    spans = torch.tensor([[0, 10], [10, T]], device=device, dtype=torch.int32)
    q, k, v = ops.split_heads(qkv, N, K)
    yield "choose", lambda: backend.choose("swiglu", x)
    yield "one empty tensor", lambda: x.new_empty(T, D)
    yield "add_rms_norm", lambda: ops.add_rms_norm(x, residual, weight, 1e-5)
    yield "rope_", lambda: ops.rope_(qkv, positions, table, table, N, K)
    yield "swiglu", lambda: ops.swiglu(gate_up)
    yield "attention", lambda: ops.attention(q, k, v, cu_seqlens, T)
    yield "pool", lambda: ops.pool(x, spans)


def main() -> None:
    parser = argparse.ArgumentParser(description="host time of a call without its launch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1" if chosen.device == "cpu" else "0"
    launched = []
    for name in ("add_rms_norm", "rope_", "swiglu", "attention", "pool"):
        kernels = sys.modules[backend.kernels(name).__name__]
        kernels.launch = lambda *args, **options: launched.append(1)
    rows = []
    with ops.use("triton"), torch.no_grad():
        for name, call in operations(chosen.device):
            rows.append({"call": name, "device": chosen.device, "us": microseconds(call)})
            print(f"{name:18} {rows[-1]['us']:6.2f} us", flush=True)
    assert launched, "nothing was launched: another backend ran"
    if chosen.write:
        print(write_rows(f"dispatch-{chosen.device}", rows))


if __name__ == "__main__":
    main()
