"""Training on a GPU: a captured step gives what eager steps give, and capture does happen."""

import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "cpu"))
from tiny_model import make_model, random_tokens

from vllm_flatquant.calibration import endtoend, train
from vllm_flatquant.calibration.block import TrainableBlock
from vllm_flatquant.calibration.quantize import make_spec, quantize_block
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.steps import Steps
from vllm_flatquant.calibration.streams import record_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SMALL = {
    "samples": 7,
    "seq_len": 24,
    "batch_size": 2,
    "epochs": 4,
    "distill_epochs": 6,
}  # a short last batch
SCHEMES = [{"scheme": "w4a4", "kv": 4}, {"scheme": "w4a16"}]


@pytest.fixture
def both(monkeypatch, caplog):
    """Calls a function with captured and with eager steps; (captured, eager) results."""

    def call(module, function):
        results = []
        for graph in (True, False):
            made = []

            def steps(*args, graph=graph, made=made, **kwargs):
                made.append(Steps(*args, **kwargs, graph=graph))
                return made[-1]

            monkeypatch.setattr(module, "Steps", steps)
            with caplog.at_level(logging.WARNING):
                results.append(function())
            assert [s.graph is not None for s in made] == [graph] * len(made)
        assert not caplog.records
        return results

    return call


@pytest.mark.parametrize("settings", SCHEMES, ids=lambda s: s["scheme"])
@pytest.mark.parametrize("matrix", ["svd", "direct", "orthogonal"])
def test_block_training(tmp_path, both, settings, matrix):
    device = torch.device("cuda")
    source = ModelSource(make_model(tmp_path / "model"))
    recipe = make_recipe(**SMALL, **settings, matrix=matrix)
    x, kwargs = record_inputs(source, random_tokens(7, 24), device)
    x = x.to(device)

    def losses():
        layer = source.load_block(0, device)
        target, stats = train.collect_stats(layer, source.arch, x, kwargs[0], 2, device)
        block = TrainableBlock(layer, source.arch, recipe, stats, seed=0)
        report = train.train_block(block, layer, x, target, kwargs[0], recipe, device)
        return torch.tensor(report.losses), report.skipped

    (captured, skipped), (eager, _) = both(train, losses)
    assert skipped == 0 and len(captured) == SMALL["epochs"]
    if matrix == "svd":  # with other matrices the loss of a random model need not fall in so few steps
        assert captured[-1] < captured[0]
    torch.testing.assert_close(captured, eager, rtol=2e-2, atol=0)  # flipped roundings, over 16 steps


def test_end_to_end_training(tmp_path, both, monkeypatch):
    monkeypatch.setattr(endtoend, "HELD_OUT", 0)  # random rows teach nothing about each other
    device = torch.device("cuda")
    source = ModelSource(make_model(tmp_path / "model"))
    recipe = make_recipe(**SMALL)
    spec, tokens = make_spec(source, recipe), random_tokens(7, 24)
    x, kwargs = record_inputs(source, tokens, device)
    x = x_q = x.to(device)
    blocks = []
    for i in range(source.num_blocks):
        x, x_q, tensors, _ = quantize_block(source, i, recipe, spec, x, x_q, kwargs[i], device)
        blocks.append(tensors)

    def run():
        return endtoend.distill(source, blocks, tokens, recipe, spec, device)

    (captured, _, report), (eager, _, expected) = both(endtoend, run)
    assert report.kl_last_epoch < report.kl_first_epoch
    assert report.kl_last_epoch == pytest.approx(expected.kl_last_epoch, rel=0.05)
    for mine, other in zip(captured, eager, strict=True):
        assert mine.keys() == other.keys()
