"""Tests run on two cores beside others: waiting threads must not spin, and helpers are imported by name. The
longest files go first, so that several processes (``pytest -n``) end at about the same time.

Fixtures: a tiny random model, calibration tokens for it, the command line, and what it refuses.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if shutil.which("g++") is None:
    # vLLM compiles a part of its sampler even when it is told to be eager.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


LONGEST = [
    f"test_{name}.py"
    for name in (
        *(
            "serving_perplexity",
            "example_accuracy",
            "recipes_accuracy",
            "serving_engine",
            "serving_features",
        ),
        *("resume", "data_parallel", "calibration_endtoend", "plan", "docs"),
    )
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (LONGEST + [item.path.name]).index(item.path.name))


@pytest.fixture
def model(tmp_path):
    from tiny_model import make_model  # not before the environment above is set

    return make_model(tmp_path / "model")


@pytest.fixture
def calib(tmp_path):
    import numpy as np
    from tiny_model import random_tokens

    np.save(tmp_path / "calib.npy", random_tokens(4, 24).numpy())
    return tmp_path / "calib.npy"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; (status, stdout, stderr)."""
    from vllm_flatquant import cli

    def call(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["flatquant", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture
def refuses(run, tmp_path, model, calib):
    """Check that `flatquant quantize` refuses with a message holding every given part."""

    def check(*parts, options=(), source=None, tokens=None, leaves=()):
        out = tmp_path / "out"
        before = sorted(p.name for p in tmp_path.iterdir())
        status, _, err = run(
            *("quantize", source or model, "--out", out, "--calib", tokens or calib, "--device", "cpu"),
            *("--samples", 4, "--seq-len", 24, "--epochs", 1, *options),
        )
        assert status == 1, err
        lines = [line for line in err.splitlines() if line.startswith("flatquant: ")]
        assert len(lines) == 1
        assert "Traceback" not in err
        for part in parts:
            assert part in lines[0], lines[0]
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, *leaves])

    return check
