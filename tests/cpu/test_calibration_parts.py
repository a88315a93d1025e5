"""Matrices, factor pairs, clips, straight-through rounding, recipes, calibration text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import make_model, random_tokens

from vllm_flatquant.calibration.data import stdlib_texts
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.factors import factor_pair
from vllm_flatquant.calibration.matrices import MATRICES, STABILITY, AffineMatrix
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import Recipe, make_recipe
from vllm_flatquant.calibration.reference import read_spec
from vllm_flatquant.calibration.shards import choose_shards
from vllm_flatquant.calibration.sites import Site
from vllm_flatquant.calibration.straight_through import fake_quantize
from vllm_flatquant.calibration.weights import WeightClip, fake_quantize_weight
from vllm_flatquant.kernels.kron_quant import kron_quant_ref
from vllm_flatquant.kernels.quantize import dequantize_weight_ref, quantize_ref
from vllm_flatquant.spec import Factors


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("n", [1, 5, 16])
def test_matrix_and_inverse_transpose(kind, n):
    matrix = MATRICES[kind](3, n, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        p, p_inv_t = matrix()
    assert torch.allclose(p @ p_inv_t.mT, torch.eye(n).expand(3, -1, -1), atol=1e-4)


@pytest.mark.parametrize(
    ("n", "pair"),
    [
        (4096, (64, 64)),
        (14336, (112, 128)),
        (5120, (64, 80)),
        (25600, (128, 200)),  # 160 x 160 is more balanced but fits no kernel
        (27648, (128, 216)),
        (28672, (128, 224)),
        (1408, (32, 44)),
        (384, (16, 24)),
        (2 * 7 * 11, (11, 14)),
        (4 * 269, (4, 269)),
        (1, (1, 1)),
    ],
)
def test_factor_pair(n, pair):
    assert factor_pair(n) == pair


def test_factor_pair_prefers_the_smallest_tile_then_multiples_of_16():
    assert factor_pair(5120) == (64, 80)
    assert factor_pair(1536) == (32, 48)
    assert factor_pair(768) == (24, 32)  # a tile of 32 x 32; 16 x 48 takes 16 x 64
    assert factor_pair(11008) == (86, 128)  # 43 is prime: no balanced pair of multiples of 16
    assert factor_pair(13824) == (108, 128)  # 96 x 144 would take a tile of 128 x 256
    assert factor_pair(8960) == (70, 128)  # of the same tile as 80 x 112, and one for Hopper's kernel
    assert factor_pair(8160) == (85, 96)  # 32 x 255 has fewer products, and a factor that fills the chip


@pytest.mark.parametrize(
    "intermediate, heads, kv_heads, shards",
    [
        (14336, 32, 8, 1),
        (25600, 64, 8, 2),
        (18944, 28, 4, 2),
        (28672, 64, 8, 2),
        (29568, 64, 8, 4),
        (18944, 27, 3, 1),
    ],
    ids=[
        "Llama-3-8B",
        "Qwen3-32B",
        "Qwen2.5-7B",
        "Llama-3-70B",
        "Qwen2.5-72B",
        "heads that cannot be split",
    ],
)
def test_as_many_shards_as_make_the_kernels_quick(intermediate, heads, kv_heads, shards):
    sizes = heads, kv_heads, intermediate
    assert choose_shards(make_recipe(), *sizes) == shards
    assert (max(factor_pair(intermediate // shards)) <= 128) == (heads != 27)
    for scheme in ("w4a16", "w8a8"):  # served by vLLM's kernels, with one scale a row or a token
        assert choose_shards(make_recipe(scheme=scheme), *sizes) == 1
    assert choose_shards(make_recipe(widest_factor=128), *sizes) == shards
    assert choose_shards(make_recipe(widest_factor=256), *sizes) == 1
    assert choose_shards(make_recipe(transforms=["qkv"]), *sizes) == 1
    assert choose_shards(make_recipe(shards=1), *sizes) == 1
    with pytest.raises(UserError, match="shards=8 does not fit 12 query heads.*use one of 1, 2, 4"):
        choose_shards(make_recipe(shards=8), 12, 4, 1024)


def test_a_checkpoint_of_as_many_shards(tmp_path):
    model = make_model(tmp_path / "model", intermediate_size=2 * 67 * 128, num_hidden_layers=1)
    np.save(tmp_path / "calib.npy", random_tokens(2, 16).numpy())
    recipe = make_recipe(samples=2, seq_len=16, epochs=1, scheme="w4a8")
    spec = read_spec(quantize(model, tmp_path / "out", recipe, str(tmp_path / "calib.npy"), "cpu"))
    assert spec is not None and spec.shards == 2 and spec.sites.o == 3
    assert spec.sites.down == Factors(left=67, right=128)


def test_factor_pair_as_wide_as_wanted():
    assert factor_pair(4096, widest=128) == (32, 128)
    assert factor_pair(4096, widest=1024) == (16, 256)  # what the kernels hold
    assert factor_pair(384, widest=128) == (3, 128)
    assert factor_pair(14336, widest=128) == (112, 128)
    assert factor_pair(28672, widest=128) == factor_pair(28672)  # 224 x 128 is beyond the kernels


def test_no_factor_pair_names_the_dimension():
    with pytest.raises(UserError, match="intermediate_size 10007"):
        factor_pair(10007, "intermediate_size")


def test_fake_quantize_is_the_reference_and_passes_gradients():
    z = torch.randn(5, 32, requires_grad=True)
    out = fake_quantize(z, 4, 0.9)
    codes, scale = quantize_ref(z.detach(), 4, 0.9)
    assert torch.allclose(out, codes * scale[:, None], atol=1e-6)
    out.sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


def test_site_is_kron_quant_ref():
    site = Site(2, 3, 4, 4, "svd", torch.Generator().manual_seed(0))
    x = torch.randn(7, 24)
    left, _, right, _ = site.matrices()
    codes, scale = kron_quant_ref(x, left, right, site.clip, 4)
    expected = (codes.view(7, 2, 12) * scale[..., None]).view(7, 24)
    assert torch.allclose(site(x), expected, atol=1e-5)


def test_weight_fake_quantization_is_dequantized_codes():
    w = torch.randn(6, 32)
    groups = quantize_ref(w.view(6, 4, 8), 4)
    expected = dequantize_weight_ref(groups[0].view(6, 32), groups[1])
    assert torch.allclose(fake_quantize_weight(w, 4, 8), expected, atol=1e-6)


def test_weight_clip_bounds_each_group():
    clip = WeightClip(6, 4)
    w = torch.randn(6, 32)
    clipped = clip(w, 8).view(6, 4, 8)
    limit = w.view(6, 4, 8).amax(-1) * torch.tensor(4.0).sigmoid()
    assert torch.allclose(clipped.amax(-1), limit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "w3a3"}, "scheme='w3a3'"),
        ({"kv": 5}, "kv=5"),
        ({"rounding": "floor"}, "rounding='floor'"),
        ({"samples": 0}, "samples=0"),
        ({"scheme": "w4a4", "group_size": 128}, "only with 16-bit activations"),
        ({"no_such": 1}, "no_such"),
        ({"transforms": ("qkv", "k_proj")}, "transforms="),
        ({"activation_clip": 1.5}, "activation_clip=1.5"),
        ({"v_each_head": True}, "leave o out of transforms"),
    ],
)
def test_recipe_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        make_recipe(**settings)


def test_affine_matrix_opens_from_its_diagonal():
    matrix = AffineMatrix(2, 8, torch.Generator())
    with torch.no_grad():
        matrix.p += 0.3 * torch.randn(2, 8, 8)
    seen = []
    for epoch in range(4):
        matrix.begin_epoch(epoch, 4)
        p, inv_t = matrix()
        assert torch.allclose(p @ inv_t.mT, torch.eye(8).expand(2, 8, 8), atol=1e-5)
        assert torch.equal(p.diagonal(dim1=1, dim2=2), matrix.p.diagonal(dim1=1, dim2=2))
        seen.append(int((p[0] != 0).sum()))
        assert p[0, 0, 1 if epoch == 0 else 2 * epoch] == STABILITY * matrix.p[0, 0, max(1, 2 * epoch)]
    assert seen == [8 + 2 * (7 + 6), 8 + 2 * (7 + 6 + 5 + 4), 8 + 2 * (28 - 1), 64]


def test_recipe_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.samples, recipe.seq_len, recipe.epochs, recipe.batch_size) == (128, 2048, 15, 4)


def test_stdlib_calibration_leaves_out_the_held_out_files():
    held_out = (Path(__file__).parents[2] / "examples" / "heldout.txt").read_text(encoding="utf-8")
    texts = list(stdlib_texts())
    assert len(texts) > 300
    assert not [text[:80] for text in texts if len(text) > 200 and text in held_out]
