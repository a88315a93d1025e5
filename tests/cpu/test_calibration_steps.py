"""Optimizer steps: the schedule, AdamW's numbers, and that a bad step changes nothing."""

import math

import pytest
import torch
from tiny_model import make_model, random_tokens
from torch import nn

from vllm_flatquant.calibration import quantize_block
from vllm_flatquant.calibration.quantize import make_spec
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.steps import MeanLoss, Steps, cosine
from vllm_flatquant.calibration.streams import record_inputs

CPU = torch.device("cpu")


def test_cosine_warms_up_and_ends_at_its_floor():
    factor = cosine(100, warmup=0.1, floor=1e-3)
    assert [factor(i) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == 1 and factor(100) == pytest.approx(1e-3)
    assert factor(55) == pytest.approx(1e-3 + (1 - 1e-3) / 2)


@pytest.mark.parametrize("normalize", [False, True])
def test_steps_are_adamw_with_the_schedule(normalize):
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    twins = [nn.Parameter(p.detach().clone()) for p in (a, b)]
    data = torch.randn(7, 5, 4)

    def loss(p, q, x):
        return ((x @ p + q) ** 2).mean()

    groups = [{"params": [a], "lr": 1e-2}, {"params": [b], "lr": 1e-1}]
    trainer = Steps(lambda x: loss(a, b, x), groups, cosine(7), CPU, 1e-2, normalize)
    expected = torch.optim.AdamW(
        [{"params": [twins[0]], "lr": 1e-2}, {"params": [twins[1]], "lr": 1e-1}], weight_decay=1e-2
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(expected, 7)
    for x in data:
        value = loss(*twins, x)
        assert trainer.step(x).item() == pytest.approx(value.item(), rel=1e-5)
        expected.zero_grad()
        (value / value.detach() if normalize else value).backward()
        expected.step()
        schedule.step()
    for p, twin in zip((a, b), twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
    assert trainer.skipped == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    p = nn.Parameter(torch.ones(3))
    trainer = Steps(lambda x: (p * x).square().sum(), [{"params": [p], "lr": 0.1}], lambda _: 1.0, CPU)
    trainer.step(torch.ones(3))
    kept = p.detach().clone()
    moments = {k: v.clone() for k, v in trainer.optimizer.state[p].items()}
    skipped = trainer.step(torch.tensor([1.0, bad, 1.0]))
    assert skipped.isnan()
    mean = MeanLoss(skipped.device)
    mean.add(torch.tensor(3.0), 2)
    mean.add(skipped, 4)
    assert float(mean) == 3.0, "a skipped step is no perfect one"
    assert trainer.skipped == 1
    assert torch.equal(p, kept)
    assert all(torch.equal(v, moments[k]) for k, v in trainer.optimizer.state[p].items())
    trainer.step(torch.ones(3))
    assert torch.isfinite(p).all() and not torch.equal(p, kept)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_a_block_is_multiplied_in_the_recipes_precision(tmp_path, monkeypatch, precision):
    """All but the folding, and nothing after it."""
    seen = {}
    for name in ("collect_stats", "block_error", "fold_block", "round_block", "run_block"):
        exact = getattr(quantize_block, name)

        def watched(*args, name=name, exact=exact):
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return exact(*args)

        monkeypatch.setattr(quantize_block, name, watched)
    source = ModelSource(make_model(tmp_path / "model"))
    few = {"samples": 2, "seq_len": 16, "batch_size": 1, "epochs": 1}
    recipe = make_recipe(**few, precision=precision, rounding="gptq")
    x, kwargs = record_inputs(source, random_tokens(2, 16), CPU)
    quantize_block.quantize_block(source, 0, recipe, make_spec(source, recipe), x, x, kwargs[0], CPU)
    assert seen.pop("fold_block") == {"highest"}
    assert len(seen) == 4 and all(found == {precision} for found in seen.values())
    assert torch.get_float32_matmul_precision() == "highest"
