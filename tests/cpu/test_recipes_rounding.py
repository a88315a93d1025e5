"""Recipes that round or rescale, on the trained example model: each against a named baseline, and served.

Margins are about half of what was measured. docs/decisions.md has the measurements, and the published orders
that do not show on this model.
"""

import json
from statistics import fmean

import pytest
import torch

from vllm_flatquant.calibration.evaluate import perplexity
from vllm_flatquant.calibration.reference import load_reference

from .example_model import Checkpoints, with_outliers
from .vllm_model import layers_and_references

FEW = {"samples": 16, "seq_len": 256}
LITTLE = {"samples": 2, "seq_len": 128}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("rounding"), 8)


@pytest.mark.parametrize(
    "name",
    ["smoothquant-w8a8", "smoothquant-w4a8", "gptq-w4a16", "qronos-w4a4", "magr-w3a16", "magr-w2a16"],
)
def test_served_layers_equal_the_reference(checkpoints, name):
    """Every linear layer of vLLM's model, loaded from the checkpoint."""
    folder = checkpoints.make(name, **LITTLE, magr_steps=5)[1]
    compared = 0
    for site, actual, expected in layers_and_references(folder):
        assert torch.equal(actual, expected), site
        compared += 1
    assert compared == 4 * 5


def test_smoothquant_under_rtn_on_outliers(tmp_path):
    """Without outliers, W8A8 costs nothing that could be seen."""
    outliers = Checkpoints(tmp_path, 8, with_outliers(tmp_path / "model"))
    smooth = outliers.make("smoothquant-w8a8", **FEW)[0]
    assert smooth < 0.8 * outliers.make("smoothquant-w8a8", diag=(), **FEW)[0]
    assert smooth < 1.005 * perplexity(load_reference(outliers.model), outliers.rows)


def error_of_first_blocks(folder):
    """On the calibration text, the first two blocks."""
    log = [json.loads(line) for line in (folder / "calibration_log.jsonl").read_text().splitlines()]
    return sum(report["error_after"] for report in log[:2])


def test_gptq_under_rtn_at_three_bits(checkpoints):
    ours = checkpoints.make("gptq-w4a16", scheme="w3a16", **FEW)[0]
    assert ours < 0.99 * checkpoints.make("gptq-w4a16", scheme="w3a16", rounding="rtn", **FEW)[0]


def test_gptq_under_rtn_at_four_bits(checkpoints):
    """And other text too, by 0.2% in the mean; single seeds, or processors, differ by 0.3%."""
    made = [checkpoints.make("gptq-w4a16", seed=seed, **FEW) for seed in range(6)]
    rtn, rtn_folder = checkpoints.make("gptq-w4a16", rounding="rtn", **FEW)
    for _, folder in made:
        assert error_of_first_blocks(folder) < 0.9 * error_of_first_blocks(rtn_folder)
    assert fmean(perplexity for perplexity, _ in made) < rtn


def test_qronos_fits_the_calibration_text_better_than_gptq(checkpoints):
    """On other text it does not gain with so few tokens: the finding is in docs/decisions.md."""
    gptq, gptq_folder = checkpoints.make("gptq-w4a16", **FEW)
    qronos, qronos_folder = checkpoints.make("qronos-w4a16", **FEW)
    assert error_of_first_blocks(qronos_folder) < 0.88 * error_of_first_blocks(gptq_folder)
    assert qronos < 1.015 * gptq


def test_magr_under_gptq_at_three_bits(checkpoints):
    """Both with the scale of the largest weight, as published."""
    plain = checkpoints.make("magr-w3a16", magr_alpha=0.0, weight_shrink=1.0, **FEW)[0]
    assert checkpoints.make("magr-w3a16", **FEW)[0] < 0.96 * plain
