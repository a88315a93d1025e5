"""On the trained example model: each system beats what its paper says it beats, by a stated margin.

Calibration is tiny, so trained recipes take few steps at a larger rate than their published one. Margins are about
half of what was measured (docs/decisions.md has the measurements, and the order that did not show).
"""

import pytest
import torch
import torch.nn.functional as F

from vllm_flatquant.calibration.data import calibration_tokens
from vllm_flatquant.calibration.learned_rotation import SpinNetwork, learn_rotation
from vllm_flatquant.calibration.recipes import choose_recipe
from vllm_flatquant.calibration.reference import quantized_spec
from vllm_flatquant.calibration.rotation import hadamard_rotation
from vllm_flatquant.calibration.source import ModelSource

from .example_model import MODEL, Checkpoints

FEW = {"samples": 16, "seq_len": 128}
TRAINED = {**FEW, "epochs": 6, "batch_size": 4, "lr": 0.02}
PLAIN = {**FEW, "epochs": 0, "diag": False, "weight_clip": False}
"""Makes round-to-nearest of the untransformed model out of an OmniQuant recipe."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Each recipe quantized once."""
    return Checkpoints(tmp_path_factory.mktemp("q"), 8)


@pytest.fixture(scope="module")
def measure(checkpoints):
    """Perplexity of a recipe's checkpoint on held-out text."""
    return lambda name, **settings: checkpoints.make(name, **settings)[0]


@pytest.mark.parametrize("name", ["quarot-w4a4-rtn", "quarot-w4a4"])
def test_quarot_under_plain_rounding(measure, name):
    assert measure(name, **FEW) < 0.94 * measure("omniquant-w4a4", **PLAIN)


def test_wide_factors_under_plain_rounding(checkpoints):
    """Under balanced factors too with more text (docs/decisions.md); in 24 steps the two do not differ."""
    found, folder = checkpoints.make("flatquant-wide-w4a4", **TRAINED)
    sites = quantized_spec(folder).sites
    for site, left in ((sites.qkv, 2), (sites.gate_up, 2), (sites.down, 5)):
        assert (site.left, site.right) == (left, 128)
    assert found < 0.93 * checkpoints.make("omniquant-w4a4", **PLAIN)[0]


def test_gptq_under_rtn_behind_rotations(measure):
    assert measure("quarot-w4a4", **FEW) < 0.999 * measure("quarot-w4a4-rtn", **FEW)


@pytest.mark.parametrize(
    ("name", "margin", "seeds", "more"),
    [
        ("omniquant-w4a4", 0.995, 1, {}),
        ("affinequant-w4a4", 0.996, 3, {}),  # 24 steps at this rate: seeds differ by 2%
        ("omniquant-w4a16", 0.996, 1, {"lr": 0.06}),
    ],
)
def test_learned_scalings_under_plain_rounding(measure, name, margin, seeds, more):
    plain = measure("omniquant-" + name.partition("-")[2], **PLAIN)
    found = [measure(name, **{**TRAINED, **more, "seed": seed}) for seed in range(seeds)]
    assert sum(found) / seeds < margin * plain, found


def test_spinquant_lowers_the_cross_entropy_of_the_quantized_model():
    source = ModelSource(MODEL)
    recipe = choose_recipe("spinquant-w4a4", **FEW, rotation_steps=40, rotation_batch=4).recipe
    tokens = calibration_tokens("stdlib", MODEL, recipe.samples, recipe.seq_len, recipe.seed)
    learned = learn_rotation(source, recipe, tokens, torch.device("cpu"))

    def cross_entropy(rotation):
        with torch.no_grad():
            logits = SpinNetwork(source, recipe, rotation, torch.device("cpu"))(tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    start = hadamard_rotation(source, recipe.seed)
    start.r2 = [torch.eye(source.head_dim, dtype=torch.float64)] * source.num_blocks
    assert cross_entropy(learned) < cross_entropy(start) - 0.02


def test_spinquant_under_plain_rounding(measure):
    few = {**FEW, "rotation_steps": 12, "rotation_batch": 4}
    assert measure("spinquant-w4a4", **few) < 0.94 * measure("omniquant-w4a4", **PLAIN)
