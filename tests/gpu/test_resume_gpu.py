"""On one GPU a run that was interrupted ends with the same bytes, and a dry run foretells the GPU's memory."""

import json

import numpy as np
import pytest
import torch

from vllm_flatquant.calibration.plan import plan_run
from vllm_flatquant.calibration.quantize import Callbacks, quantize
from vllm_flatquant.calibration.recipe import make_recipe

from ..cpu.tiny_model import make_model, random_tokens
from ..soak.kills import contents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BLOCKS = 3
TOKENS = 512
"""Of a row: the fused attention's backward would divide 128 between two programs at most, whose sum is the same in any
order."""


class Stop(Exception):
    """What interrupts a run here."""


@pytest.mark.parametrize("on_gpu", [True, False], ids=["streams-on-gpu", "streams-on-cpu"])
@pytest.mark.parametrize(
    "settings",
    # 96 heads take attention's fused form, 24 its plain one
    [{"batch_size": 16}, {"rounding": "gptq", "kv": 4, "scheme": "w4a8"}],
)
def test_same_bytes_after_an_interruption(tmp_path, monkeypatch, settings, on_gpu):
    if not on_gpu:
        for module in ("quantize", "plan"):
            name = f"vllm_flatquant.calibration.{module}.stream_device"
            monkeypatch.setattr(name, lambda *_: torch.device("cpu"))
    sizes = {"num_hidden_layers": BLOCKS, "hidden_size": 192, "max_position_embeddings": TOKENS}
    model = make_model(tmp_path / "model", **sizes)
    np.save(tmp_path / "calib.npy", random_tokens(16, TOKENS).numpy())
    recipe = make_recipe(samples=16, seq_len=TOKENS, epochs=3, **settings)
    arguments = (recipe, str(tmp_path / "calib.npy"), "cuda")
    expected = contents(quantize(model, tmp_path / "whole", *arguments))
    assert contents(quantize(model, tmp_path / "again", *arguments)) == expected

    def stop(report):
        if report.block == 1:
            raise Stop

    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", *arguments, callbacks=Callbacks(block=stop))
    assert contents(quantize(model, tmp_path / "out", *arguments, resume=True)) == expected


def test_a_dry_run_foretells_the_memory(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64}
    model = make_model(tmp_path / "model", **sizes)
    np.save(tmp_path / "calib.npy", random_tokens(128, 128).numpy())
    arguments = (make_recipe(samples=128, seq_len=128, epochs=2), str(tmp_path / "calib.npy"), "cuda")
    plan, _ = plan_run(model, tmp_path / "out", *arguments)
    log = quantize(model, tmp_path / "out", *arguments) / "calibration_log.jsonl"
    peak = max(json.loads(line)["peak_memory_gb"] for line in log.read_text().splitlines()) * 1e9
    assert abs(plan.gpu / peak - 1) < 0.15, (plan.gpu, peak)
