"""FlatQuantLinearMethod in real vLLM models, against the reference functions on the checkpoint's tensors."""

import gc

import pytest
import torch
import torch.nn.functional as F

from vllm_flatquant import spec
from vllm_flatquant.kernels.kron import kron_ref
from vllm_flatquant.kernels.kron_quant import kron_quant_ref
from vllm_flatquant.kernels.pack import unpack_codes
from vllm_flatquant.kernels.quantize import dequantize_weight_ref
from vllm_flatquant.kernels.w4_gemm import w4_gemm_ref
from vllm_flatquant.sites import SITES

from .tiny_checkpoint import (
    HEAD_DIM,
    HEADS,
    INTERMEDIATE,
    KV_HEADS,
    Recipe,
    random_model,
    write_checkpoint,
)
from .vllm_model import load_model, tensor_parallel

SCHEMES = {"w4a4": (4, None), "w4a8": (8, None), "w4a16": (16, None), "w4a16-g32": (16, 32)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def site_output(tensors, prefix, site, bits, x, weight_bits=4):
    """What a site's fused linear must compute for x [T, K], from the checkpoint's tensors."""
    parent = f"{prefix}.{site.module.partition('.')[0]}"
    stem = f"{parent}.{site.name}_transform"
    left = tensors.get(f"{stem}.{'head' if site.name == 'o' else 'left'}")
    right, clip = tensors.get(f"{stem}.right"), tensors.get(f"{stem}.clip")
    names = [f"{parent}.{part}" for part in site.parts]
    codes = torch.cat([unpack_codes(tensors[f"{name}.weight_packed"], weight_bits) for name in names])
    scale = torch.cat([tensors[f"{name}.weight_scale"] for name in names])
    biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
    bias = torch.cat(biases).to(x.dtype) if biases else None
    if bits == 16:
        return F.linear(kron_ref(x, left, right), dequantize_weight_ref(codes, scale).to(x.dtype), bias)
    x_codes, x_scale = kron_quant_ref(x, left, right, clip, bits)
    return w4_gemm_ref(x_codes, x_scale, codes, scale, bias, x.dtype)


def check_model(folder, recipe, **options):
    """Load the recipe's checkpoint and compare every quantized layer with the references, bit for bit."""
    tensors = write_checkpoint(folder, recipe)
    model = load_model(folder, **options)
    for index, block in enumerate(model.model.layers):
        for site in SITES:
            layer = block.get_submodule(site.module)
            x = torch.randn(5, layer.input_size).to(layer.params_dtype)
            prefix = f"model.layers.{index}"
            expected = site_output(tensors, prefix, site, recipe.bits, x, recipe.weight_bits)
            actual = layer(x)[0]
            assert actual.dtype == x.dtype
            assert torch.equal(actual, expected), f"{index} {site.name}"
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_equal_the_references(tmp_path, scheme, dtype):
    bits, group_size = SCHEMES[scheme]
    check_model(tmp_path, Recipe(bits=bits, group_size=group_size, shards=2, dtype=DTYPES[dtype]))


@pytest.mark.parametrize(
    "scheme", [s for s, (weight_bits, _) in spec.SCHEMES.items() if weight_bits != 4]
)
def test_other_weight_widths_equal_the_references(tmp_path, scheme):
    weight_bits, bits = spec.SCHEMES[scheme]
    check_model(tmp_path, Recipe(bits=bits, weight_bits=weight_bits, shards=2, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_architecture_loads(tmp_path, architecture, bits):
    model = check_model(tmp_path, Recipe(architecture, bits=bits, k_bits=8, v_bits=8))
    assert (model.model.layers[0].self_attn.qkv_proj.bias is not None) == (architecture == "Qwen2")


def test_biases_of_every_linear_layer(tmp_path):
    recipe = Recipe(config={"attention_bias": True, "mlp_bias": True})
    model = check_model(tmp_path, recipe)
    assert all(model.model.layers[0].get_submodule(site.module).bias is not None for site in SITES)


def test_sites_without_factors(tmp_path):
    check_model(tmp_path, Recipe(no_site=("qkv", "o", "gate_up", "down"), shards=2))


def test_dequantized_function_is_about_the_original(tmp_path):
    # Transforms and folded weights cancel; what is left is the rounding of the weights, in groups of 8.
    recipe = Recipe(bits=16, group_size=8, shards=2)
    write_checkpoint(tmp_path, recipe)
    layers, original = load_model(tmp_path).model.layers, random_model(recipe).model.layers
    for site in SITES:
        layer = layers[1].get_submodule(site.module)
        parent = original[1].get_submodule(site.module.partition(".")[0])
        x = torch.randn(64, layer.input_size)
        expected = torch.cat([parent.get_submodule(part)(x) for part in site.parts], dim=-1)
        error = (layer(x)[0] - expected).norm() / expected.norm()
        assert error < 0.08, f"{site.name}: {error:.3f}"


def test_ignored_layers_keep_their_weights(tmp_path):
    ignored = ("lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.o_proj")
    names = tuple(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))
    recipe = Recipe(ignore=(*ignored, *names))
    tensors = write_checkpoint(tmp_path, recipe)
    layers = load_model(tmp_path).model.layers
    x = torch.randn(3, 192)
    expected = F.linear(x, tensors["model.layers.0.mlp.down_proj.weight"])
    torch.testing.assert_close(layers[0].mlp.down_proj(x)[0], expected)
    assert type(layers[1].self_attn.o_proj.quant_method).__name__ == "UnquantizedLinearMethod"
    assert type(layers[1].mlp.down_proj.quant_method).__name__ == "FlatQuantLinearMethod"


def test_extreme_inputs_stay_finite(tmp_path):
    # CUDA graphs pad a batch with rows that hold anything finite; zero rows have no maximum to divide by.
    write_checkpoint(tmp_path, Recipe())
    layer = load_model(tmp_path).model.layers[0].mlp.gate_up_proj
    x = torch.stack([torch.zeros(96), torch.full((96,), 1e-38), torch.full((96,), 1e30)])
    out = layer(x)[0]
    assert torch.isfinite(out).all()
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_token_counts_do_not_change_results(tmp_path):
    write_checkpoint(tmp_path, Recipe(shards=2))
    layer = load_model(tmp_path).model.layers[0].mlp.down_proj
    x = torch.randn(17, 192)
    whole = layer(x)[0]
    assert torch.equal(whole, torch.cat([layer(row)[0] for row in x.split(1)]))
    assert layer(x[:0])[0].shape == (0, 96)


@pytest.mark.parametrize("weight_bits, bits", [(4, 4), (4, 16), (3, 8), (8, 8)])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_add_up(tmp_path, size, weight_bits, bits):
    """Each rank loads its own part; the ranks' outputs concatenate or add up to the whole layer's."""
    write_checkpoint(tmp_path, Recipe("Qwen2", bits=bits, weight_bits=weight_bits, shards=4))
    whole = load_model(tmp_path).model.layers[0]
    ranks = []
    for rank in range(size):
        with tensor_parallel(rank, size):
            ranks.append(load_model(tmp_path).model.layers[0])
    x = torch.randn(7, 128)

    def split(block, module, parts):
        return block.get_submodule(module)(x)[0].split(parts, -1)

    widths = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    local = [
        max(n // size, HEAD_DIM) for n in widths
    ]  # with more ranks than KV heads, they are replicated
    expected = split(whole, "self_attn.qkv_proj", widths)
    for rank, block in enumerate(ranks):
        for part, result in enumerate(split(block, "self_attn.qkv_proj", local)):
            pieces = expected[part].split(local[part], -1)
            torch.testing.assert_close(result, pieces[rank * len(pieces) // size], rtol=0, atol=1e-5)
    for part, result in enumerate(split(whole, "mlp.gate_up_proj", INTERMEDIATE)):
        pieces = [split(block, "mlp.gate_up_proj", INTERMEDIATE // size)[part] for block in ranks]
        torch.testing.assert_close(torch.cat(pieces, -1), result, rtol=0, atol=1e-5)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer = whole.get_submodule(name)
        x = torch.randn(7, layer.input_size)
        parts = x.chunk(size, -1)
        layers = [block.get_submodule(name) for block in ranks]
        total = sum(
            one.quant_method.apply(one, part, None) for one, part in zip(layers, parts, strict=True)
        )
        torch.testing.assert_close(total, layer(x)[0], rtol=1e-5, atol=1e-5)


def test_tied_embeddings(tmp_path):
    recipe = Recipe(config={"tie_word_embeddings": True})
    write_checkpoint(tmp_path, recipe, **{"lm_head.weight": None})
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_compiled_layer_keeps_every_rounding_point(tmp_path):
    # Left to itself the compiler fuses the 16-bit rounding between two products away.
    write_checkpoint(tmp_path, Recipe(bits=8, shards=2, dtype=torch.bfloat16))
    layer = load_model(tmp_path).model.layers[0].mlp.down_proj
    x = torch.randn(33, 192, dtype=torch.bfloat16)
    gc.collect()  # vLLM frees earlier models' CPU kernels with an .item(), which must not happen in tracing
    compiled = torch.compile(lambda y: layer.quant_method.apply(layer, y * 1.0, None), fullgraph=True)
    assert torch.equal(compiled(x), layer.quant_method.apply(layer, x * 1.0, None))
