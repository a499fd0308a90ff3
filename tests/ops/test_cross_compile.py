"""Every Triton kernel compiles for GPUs that are not here, within stated bounds.

In processes of their own: kernels defined under Triton's interpreter cannot be compiled. Long, two
to four minutes on two cores: several hundred distinct launches at a third of a second each (all
shapes for sm_90, those of the benchmarks for sm_80 and sm_100); a second run finds them in Triton's
cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# Bytes that a block may use at most (CUDA C++ programming guide, table of compute capabilities).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes a thread may spill, with Triton 3.6 (which spills more) or 3.7. The exceptions: attention
# causal and with dropout, or of head dimension 256 in fp32; rows of 16,384 with a trained weight.
SPILLED = 64
EXCEPTIONS = {
    ("attention", "_forward"): 96,
    ("attention_backward", "_keys"): 192,
    ("attention_backward", "_queries"): 240,
    ("add_rms_norm", "_backward"): 176,
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.cross_compile", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_everything_compiles(rows):
    assert rows and not [row for row in rows if "error" in row]


def test_every_kernel_is_compiled_for_every_architecture(rows):
    """Whatever is handed to `launch` somewhere is launched by a benchmark's case."""
    launched = set()
    for path in (ROOT / "llm2vec_fast/ops/kernels").glob("*.py"):
        if path.stem != "launch":
            names = re.findall(r"\blaunch\(\s*(\w+),", path.read_text(encoding="utf-8"))
            launched |= {(path.stem, name) for name in names}
    assert len(launched) > 20
    for arch in SHARED:
        compiled = {(row["module"], row["kernel"]) for row in rows if row["arch"] == arch}
        fp8 = {pair for pair in launched if "fp8" in pair[0] or pair[0] == "quantize_rows"}
        expected = launched - fp8 if arch < 89 else launched
        assert compiled == expected


def test_few_registers_are_spilled_and_shared_memory_fits(rows):
    for row in rows:
        if "error" not in row:
            bound = EXCEPTIONS.get((row["module"], row["kernel"]), SPILLED)
            assert row["stack"] + row["local"] <= bound, row
            assert row["shared"] <= SHARED[row["arch"]], row
            assert row["registers"] <= 255


def test_attention_uses_the_matrix_units_of_its_generation(rows):
    expected = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    attention = [row for row in rows if row["module"].startswith("attention")]
    assert {row["kernel"] for row in attention} == {"_forward", "_queries", "_keys"}
    for row in attention:
        if row["case"].endswith("float16"):  # bfloat16 too; fp32 has none
            assert row["ptx_matrix"] == expected[row["arch"]], row
