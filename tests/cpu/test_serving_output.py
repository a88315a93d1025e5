"""benchmarks/serving.py: what a run says, and what its tables take from the rows."""

import sys
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return import_module("serving")


def test_a_run_says_how_it_ended(benchmarks, monkeypatch, tmp_path, capsys):
    """What failed is in the exit status, what is there already is said, and a CPU tries the tiny model only."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["serving.py", f"--results={tmp_path / 'rows.csv'}", *arguments]
        )
        benchmarks.main()
        return capsys.readouterr().out

    monkeypatch.setattr(benchmarks, "graphics_card", lambda: ("cpu", float("inf")))
    monkeypatch.setattr(benchmarks.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="no GPU here: `--models tiny`"):
        run()
    monkeypatch.setattr(benchmarks, "groups", lambda *_: ["part"])
    monkeypatch.setattr(benchmarks, "measure_group", lambda *_: ["fp8"])
    with pytest.raises(SystemExit, match="failed: fp8; the rows of the others are in"):
        run("--models=tiny")
    monkeypatch.setattr(benchmarks, "measure_group", lambda *_: [])
    assert "`--print` shows" in run("--models=tiny")
    monkeypatch.setattr(benchmarks.Run, "todo", lambda *_: {})
    assert "tiny: every figure has a row" in run("--models=tiny")
    assert "there are no such rows in" in run("--print")


def test_errors_are_shown_before_the_end_of_a_log(benchmarks, tmp_path):
    engine = object.__new__(benchmarks.Engine)
    engine.log = tmp_path / "log"
    lines = [
        "(Worker pid=7) ERROR RuntimeError: the cause",
        *["at some line"] * 20,
        "RuntimeError: failed. See above",
    ]
    engine.log.write_text("\n".join(lines))
    assert engine.tail()[0] == lines[0] and engine.tail()[1:] == lines[-12:]


def test_bf16_counts_where_something_was_measured_beside_it(benchmarks):
    """A run that was cut off after bf16 does not move the line that ratios of other runs are read against."""
    from serving_tables import collect

    def row(run, name, value, measure="decode_b1", unit="ms"):
        same = {
            "date": "",
            "gpu": "g",
            "vllm": "v",
            "engine": "own process",
            "commit": "c",
            "model": "m",
        }
        return same | {"run": run, "format": name, "measure": measure, "value": value, "unit": unit}

    rows = [row("1", "bf16", "4"), row("1", "fp8", "2"), row("2", "bf16", "9")]
    (runs,) = collect(rows).values()
    assert runs["bf16"]["decode_b1"]["value"] == 4 and runs["fp8"]["decode_b1"]["ratio"] == 2
    (runs,) = collect([row("2", "bf16", "9")]).values()
    assert runs["bf16"]["decode_b1"]["value"] == 9  # nothing else was measured at all
