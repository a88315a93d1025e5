"""vLLM's layers compute what calibration's reference does, for a recipe of each kind of transform."""

import pytest
import torch
from tiny_model import edit_config, make_model

from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipes import choose_recipe
from vllm_flatquant.calibration.reference import load_reference

from .vllm_model import layers_and_references, load_model

TINY = {"samples": 4, "seq_len": 24, "batch_size": 2}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quarot-w4a4", {}),
        ("quarot-w4a4kv4", {"shards": 2}),
        ("spinquant-w4a4kv4", {"rotation_steps": 2, "rotation_batch": 2}),
        ("omniquant-w4a4", {"epochs": 1}),
        ("omniquant-w4a16", {"epochs": 1}),
        ("affinequant-w4a4", {"epochs": 2, "kv": 8}),
        ("smoothquant-w4a8", {}),
        ("flatquant-w4a4", {"epochs": 1, "widest_factor": 24}),
    ],
)
def test_layers_of_a_recipe_in_vllm(tmp_path, calib, name, settings):
    model = make_model(tmp_path / "tied", dtype=torch.float32, tie_word_embeddings=True)
    edit_config(model, dtype="float32")
    recipe = choose_recipe(name, **TINY | settings).recipe
    out = quantize(model, tmp_path / "q", recipe, str(calib), "cpu")
    sites = []
    for site, found, expected in layers_and_references(out):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=f"{name} {site}")
        sites.append(site)
    assert len(sites) == 8
    head = load_reference(out).lm_head.weight
    served = load_model(out).lm_head.weight
    assert torch.equal(served[: len(head)], head)
