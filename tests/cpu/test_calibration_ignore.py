"""The reference backend honours ``ignore`` as the plugin does, and refuses what the plugin refuses."""

import pytest
import torch
from torch import nn

from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.reference import ReferenceLinear, load_reference

from .tiny_checkpoint import VOCAB, Recipe, random_model, write_checkpoint

PARTS = [
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
]


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_everything_ignored_is_the_unquantized_model(tmp_path, architecture):
    names = tuple(f"model.layers.{i}.{part}" for i in range(2) for part in PARTS)
    recipe = Recipe(architecture, ignore=("lm_head", *names))
    write_checkpoint(tmp_path, recipe)
    ids = torch.randint(VOCAB, (2, 20))
    expected = logits(random_model(recipe), ids)
    torch.testing.assert_close(logits(load_reference(tmp_path), ids), expected, rtol=0, atol=1e-5)


def test_ignored_parts_keep_their_weights_and_the_others_are_quantized(tmp_path):
    ignored = tuple(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))
    recipe = Recipe(ignore=("lm_head", *ignored))
    tensors = write_checkpoint(tmp_path, recipe)
    model = load_reference(tmp_path)
    for name in ignored:
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, tensors[f"{name}.weight"])
    quantized = [n for n, m in model.named_modules() if isinstance(m, ReferenceLinear)]
    assert len(quantized) == 2 * 7 - 3
    ids = torch.randint(VOCAB, (2, 20))
    exact = logits(random_model(recipe), ids)
    whole = tmp_path / "whole"
    write_checkpoint(whole, Recipe())
    error = (logits(model, ids) - exact).norm()
    assert 0 < error < (logits(load_reference(whole), ids) - exact).norm()


def test_a_parent_in_ignore_means_its_parts(tmp_path):
    parts = tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkvo")
    write_checkpoint(tmp_path, Recipe(ignore=("lm_head", "model.layers.1.self_attn", *parts)))
    attention = load_reference(tmp_path).model.layers[1].self_attn
    assert all(type(getattr(attention, f"{p}_proj")) is nn.Linear for p in "qkvo")


def test_part_of_a_fused_layer_is_refused(tmp_path):
    write_checkpoint(tmp_path, Recipe(ignore=("lm_head", "model.layers.0.self_attn.k_proj")))
    with pytest.raises(UserError, match="ignore lists k_proj but not all of q_proj, k_proj, v_proj"):
        load_reference(tmp_path)


def test_head_dim_must_be_that_of_the_key_transform(tmp_path):
    write_checkpoint(tmp_path, Recipe(k_bits=8, v_bits=8))
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"k": 32', '"k": 16'))
    with pytest.raises(UserError, match="head_dim 32 but quantization_config.sites.k is 16"):
        load_reference(tmp_path)
