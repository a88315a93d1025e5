"""A dry run foretells the run that follows, refuses what the run would refuse, and leaves nothing.

Memory is that of the whole process, so the streams here are made large beside the libraries' part. Time is processor
time, within 40% because the run is short; ``make soak`` checks longer ones within 15% (tests/soak/plans.py).
"""

import time

import numpy as np
import torch

from vllm_flatquant.calibration.plan import extend, plan_run
from vllm_flatquant.calibration.recipe import make_recipe

from ..soak.plans import compare, errors
from .tiny_model import edit_weights, make_model, random_tokens


def test_the_run_takes_what_was_foretold(tmp_path):
    model = make_model(tmp_path / "model", hidden_size=192, intermediate_size=256)
    rows = 512
    np.save(tmp_path / "calib.npy", random_tokens(rows, 128).numpy())
    recipe = make_recipe(samples=rows, seq_len=128, epochs=0, batch_size=64, rounding="gptq")
    result = compare(model, tmp_path, recipe, str(tmp_path / "calib.npy"))
    off = errors(result)
    assert result["estimated"]["mapped"] > 0.2 * result["measured"]["cpu"], result
    assert abs(off["cpu"]) < 0.1, result
    assert abs(off["staging"]) < 0.15, result
    assert abs(off["checkpoint"]) < 0.05, result
    assert abs(off["seconds"]) < 0.4, result


def test_time_of_training_goes_with_the_steps(tmp_path, model, calib, monkeypatch):
    monkeypatch.setattr(time, "monotonic", time.process_time)  # whatever else the machine does
    seconds = []
    for epochs in (2, 200):
        recipe = make_recipe(samples=4, seq_len=24, epochs=epochs, batch_size=1)
        plan, _ = plan_run(model, tmp_path / "out", recipe, str(calib), "cpu")
        seconds.append(plan.phases["train"])
        assert plan.seconds > 2 * plan.phases["train"]
    assert 30 < seconds[1] / seconds[0] < 300


def test_extend_is_a_line():
    assert extend(5.0, 2.0, 4, 2, 10) == 11.0
    assert extend(5.0, 2.0, 4, 2, 4) == 5.0
    assert extend(5.0, -1.0, 4, 2, 100) == 5.0  # noise
    assert extend(5.0, 9.0, 4, 2, 8) == 10.0  # no more than in proportion


def test_the_command_leaves_nothing(run, tmp_path, model, calib):
    options = ("--calib", calib, "--device", "cpu", "--samples", 4, "--seq-len", 24, "--epochs", 1)
    before = sorted(tmp_path.iterdir())
    status, said, err = run("quantize", model, "--out", tmp_path / "a" / "out", "--dry-run", *options)
    assert status == 0, err
    for word in (
        "memory",
        "disk",
        "time",
        "serving",
        "transforms  qkv 6x8",
        "blocks      2",
        "4 of 4 rows",
    ):
        assert word in said, said
    assert sorted(tmp_path.iterdir()) == before
    edit_weights(model, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    status, _, err = run("quantize", model, "--out", tmp_path / "a" / "out", "--dry-run", *options)
    assert status == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN or inf" in err
    assert sorted(tmp_path.iterdir()) == before
