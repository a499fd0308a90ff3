"""Importing the package is cheap and needs neither Triton nor CUDA nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("triton", "transformers", "flash_attn", "pyarrow", "huggingface_hub", "sympy")


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_alone_loads_nothing():
    found = run(
        "import sys, json, llm2vec_fast\n"
        "print(json.dumps({'torch': 'torch' in sys.modules, 'v': llm2vec_fast.__version__}))"
    )
    assert found["torch"] is False and found["v"]


def test_the_encoder_loads_neither_triton_nor_transformers():
    found = run(
        "import sys, json\n"
        "from llm2vec_fast import LLM2Vec\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "cuda = [m for m in sys.modules if m.startswith('llm2vec_fast.ops.kernels')]\n"
        "print(json.dumps({'heavy': heavy, 'kernels': cuda, 'name': LLM2Vec.__name__}))"
    )
    assert found == {"heavy": [], "kernels": [], "name": "LLM2Vec"}


def test_it_works_where_triton_and_transformers_are_absent(tmp_path):
    """None in sys.modules makes every import of that name fail, as if it were not installed."""
    found = run(
        "import sys, json\n"
        "for name in ('triton', 'transformers', 'flash_attn'): sys.modules[name] = None\n"
        "import torch\n"
        "from llm2vec_fast import LLM2Vec, ops\n"
        "y, r = ops.add_rms_norm(torch.ones(2, 4), None, torch.ones(4), 1e-6)\n"
        "print(json.dumps({'y': y.tolist()}))"
    )
    assert abs(found["y"][0][0] - 1) < 1e-5


def test_an_unknown_name_is_an_attribute_error():
    found = run(
        "import json, llm2vec_fast\n"
        "try:\n    llm2vec_fast.nonsense\nexcept AttributeError as error:\n"
        "    print(json.dumps({'error': str(error)}))"
    )
    assert "nonsense" in found["error"]
