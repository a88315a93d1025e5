"""Rounding on a GPU: blocks of columns that a CUDA graph replays get the codes of those that run one by one."""

import logging

import pytest
import torch

from vllm_flatquant.calibration import capture, rounding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(
    "method, columns, replays",
    [("gptq", 640, 4), ("gptq", 700, 4), ("gptq", 128, 0), ("qronos", 641, 4), ("qronos", 640, 3)],
)
def test_replayed_blocks(monkeypatch, caplog, method, columns, replays):
    """Of 128 columns each; the first, and a smaller last one, run as they are."""
    torch.manual_seed(0)
    weight = torch.randn(300, columns, dtype=torch.float64, device="cuda")
    x = torch.randn(2 * columns, columns, dtype=torch.float64, device="cuda")
    x[:, 1:] += x[:, :-1].clone()
    hessian = x.T @ x
    scale = (weight.abs().amax(dim=1, keepdim=True) / 7).float()
    replay, seen = capture.Recording.replay, []

    def counted(self, inputs):
        seen.append(inputs)
        return replay(self, inputs)

    monkeypatch.setattr(capture.Recording, "replay", counted)

    def codes():
        sweep = rounding.prepare(hessian.clone(), 0.01, by_norm=True)
        if method == "gptq":
            return rounding.gptq(weight, scale, sweep, 4)
        return rounding.qronos(weight, scale, sweep, hessian.clone(), 4)

    with caplog.at_level(logging.WARNING):
        replayed = codes()
        assert len(seen) == replays and not caplog.records
        monkeypatch.setenv(capture.EAGER, "1")
        eager = codes()
    assert len(seen) == replays
    assert torch.equal(replayed, eager)
    assert not torch.equal(replayed, rounding.rtn(weight, scale, 4))
