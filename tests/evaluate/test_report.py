"""The table, the JSON file, and several models in one call."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from llm2vec_fast.evaluate import Pairs, Report, compare, described, parse_specs, sts
from llm2vec_fast.evaluate.extras import scorer


def report(task="sts") -> Report:
    return Report(task, {"name": "pairs.csv"}, {"cpu": "one"})


def table(made: Report) -> str:
    out = io.StringIO()
    made.show(Console(file=out, width=100, force_terminal=True))
    return out.getvalue()


def test_two_models_side_by_side(tiny_encoder, tmp_path):
    path = tiny_encoder().path
    specs = parse_specs([f"{path},causal=true,label=one", f"{path},standardize=true,label=two"])
    pairs = Pairs(["a list", "an error", "a key"], ["a list", "a dict", "keys"], [5.0, 0.0, 3.0])
    told, output = [], tmp_path / "deep" / "figures.json"
    made = compare(
        report(), specs, lambda model, spec: sts(model, pairs, spec.standardize), output, "cpu",
        progress=told.append,
    )  # fmt: skip
    assert told == ["one", "two"]
    saved = json.loads(output.read_text())
    assert saved["rows"] == made.rows and list(saved) == ["task", "data", "machine", "utc", "rows"]
    one, two = saved["rows"]
    assert one["figures"] != two["figures"] and one["figures"]["pairs"] == 3
    assert one["model"]["settings"]["enable_bidirectional"] is False
    assert two["model"]["settings"]["enable_bidirectional"] is True
    assert two["options"] == {"standardize": True} and one["model"]["base"] == str(path)
    assert len(one["model"]["fingerprint"]) == 64 and one["seconds"] > 0
    assert saved["machine"]["cpu"] == "one" and saved["machine"]["scipy"][0].isdigit()
    assert [p.name for p in output.parent.iterdir()] == ["figures.json"]


def test_what_is_done_is_not_lost_to_a_model_that_cannot_be_loaded(tiny_encoder, tmp_path):
    specs = parse_specs([f"{tiny_encoder().path},label=good", f"{tmp_path / 'none'},label=bad"])
    with pytest.raises((ValueError, OSError)):
        compare(report(), specs, lambda *_: {"x": 1.0}, tmp_path / "f.json", "cpu")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["label"] == "good"


def test_standardize_is_refused_where_it_means_nothing():
    specs = parse_specs(["m,standardize=true"])
    with pytest.raises(ValueError, match="standardize=true is a control of `eval sts` alone"):
        compare(report("word"), specs, lambda *_: pytest.fail("measured"))


def test_the_table_has_figures_counts_and_the_best_in_bold():
    made = report()
    for label, value in (("a [red] one", 41.234), ("other", 50.0)):
        figures = {"spearman": value, "pearson": 7.0, "pairs": 1500}
        made.rows.append({"label": label, "figures": figures, "seconds": 2.0})
    shown = table(made)
    assert "a [red] one" in shown and "41.23" in shown and "pairs 1,500" in shown
    assert "\x1b[1m50.00" in shown and "\x1b[1m41.23" not in shown
    assert "sts: pairs.csv" in table(report())  # no model yet


def test_described_files_have_no_directories(tmp_path):
    (tmp_path / "a.csv").write_text("abc")
    assert described(tmp_path / "a.csv") == [{"file": "a.csv", "bytes": 3}]


def test_a_missing_scorer_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(RuntimeError, match=r"seqeval cannot be imported.*pip install .*\[eval\]"):
        scorer("seqeval.metrics", "seqeval")


def test_scorers_are_imported_where_they_are_used():
    """Importing the room must work, and be quick, without the extra."""
    code = """
import sys
for name in ("scipy", "seqeval", "sklearn", "pytrec_eval"):
    sys.modules[name] = None
import llm2vec_fast.evaluate
print([name for name in ("triton", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    specs = parse_specs(["/no/model"])
    with pytest.raises(ValueError, match="is a directory: name a file"):
        compare(report(), specs, None, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        compare(report(), specs, None, tmp_path / "file" / "figures.json")
