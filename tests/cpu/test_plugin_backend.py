"""The choice of a backend, and the GPU backend's layouts, run on the CPU implementations of its operators."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm_flatquant import _compat, backend, config
from vllm_flatquant.choice import Choice, choose_backend
from vllm_flatquant.errors import UnsupportedError
from vllm_flatquant.kernels.kron import kron_ref
from vllm_flatquant.kernels.pack import pack_codes, pack_int4, unpack_int4
from vllm_flatquant.kernels.quantize import dequantize_weight_ref
from vllm_flatquant.kernels.w4_gemm import int_matmul_ref
from vllm_flatquant.sites import SITES
from vllm_flatquant.spec import parse_spec

from .tiny_checkpoint import Recipe, random_factor, write_checkpoint
from .vllm_model import load_model, start_single_process

SHAPE = backend.LayerShape(256, 128, 256, 128)


def make_runtime(recipe, name, dtype, shape=SHAPE):
    """A runtime in the context of a vLLM run."""
    start_single_process()
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        return backend.make_runtime(parse_spec(recipe.quantization_config()), name, shape, dtype)


def random_layer(shards=2, clip=True):
    """A layer with transforms of 16 x 8 in each of the shards of 256 inputs."""
    layer = nn.Module()
    width = 256 // shards
    layer.transform_left = nn.Parameter(random_factor(shards, 16), requires_grad=False)
    layer.transform_right = nn.Parameter(random_factor(shards, width // 16), requires_grad=False)
    layer.transform_clip = nn.Parameter(0.9 + 0.1 * torch.rand(shards)) if clip else None
    return layer


@pytest.mark.parametrize(
    "capability, name, reason",
    [
        (None, "torch", "no CUDA device"),
        (75, "torch", "75 is below 80"),
        (80, "triton", "80"),
        (90, "triton", "90"),
    ],
)
def test_choice_and_reason(capability, name, reason):
    choice = choose_backend(capability)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_backend_equals_the_torch_backend(dtype, bits, shards):
    torch.manual_seed(bits + shards)
    packed, scale = pack_int4(torch.randint(-8, 8, (128, 256), dtype=torch.int8)), torch.rand(128, 1)
    x, bias = torch.randn(9, 256).to(dtype), torch.randn(128).to(dtype)
    factors = random_layer(shards)
    outputs = []
    for name in ("torch", "triton"):
        layer = nn.Module()
        layer._parameters.update(factors._parameters)
        runtime = make_runtime(Recipe(bits=bits, shards=shards), name, dtype)
        runtime.process(layer, packed, scale)
        outputs.append(runtime.apply(layer, x, bias))
    assert layer.transform_left.dtype == dtype  # what the kernels multiply by
    assert outputs[1].dtype == dtype
    if dtype == torch.bfloat16:  # exact: the factors are bf16 values
        assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("weight_bits, bits", [(2, 4), (3, 8), (8, 8)])
def test_gpu_backend_at_other_weight_widths(monkeypatch, weight_bits, bits):
    def product(a, b, scale_a, scale_b, dtype, bias):  # vLLM's, as its documentation has it
        assert b.stride() == (1, b.shape[0]) and (bias is None or bias.dtype == dtype)
        out = int_matmul_ref(a, b.t()).float() * scale_a * scale_b.t()
        return (out if bias is None else out + bias.float()).to(dtype)

    monkeypatch.setattr(_compat, "scaled_int8_product", lambda: product)
    torch.manual_seed(weight_bits)
    top = 2 ** (weight_bits - 1)
    codes = torch.randint(-top, top, (128, 256), dtype=torch.int8)
    scale, x, bias = torch.rand(128, 1), torch.randn(9, 256).bfloat16(), torch.randn(128).bfloat16()
    factors, outputs = random_layer(1), []
    for name in ("torch", "triton"):
        layer = nn.Module()
        layer._parameters.update(factors._parameters)
        runtime = make_runtime(Recipe(bits=bits, weight_bits=weight_bits), name, torch.bfloat16)
        runtime.process(layer, pack_codes(codes, weight_bits), scale)
        outputs.append(runtime.apply(layer, x, bias))
    if weight_bits < 8:
        assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2**-8, atol=1e-3)  # the order of two scales


def test_int8_product_where_there_is_none():
    with pytest.raises(UnsupportedError, match=r"no int8 matrix product .* w4a8 or w8a16"):
        make_runtime(Recipe(bits=8, weight_bits=8), "triton", torch.bfloat16)


def test_int8_product_has_one_scale_for_a_token():
    shape = backend.LayerShape(256, 128, 128, 128, 2)
    with pytest.raises(UnsupportedError, match="--tensor-parallel-size 4 or quantize with --shards 1"):
        make_runtime(Recipe(bits=8, weight_bits=8, shards=4), "triton", torch.bfloat16, shape)


def test_stand_in_has_the_shapes_of_the_processed_layer():
    """Start-up goes through a layer's kernels before the weights are there."""
    runtime, layer = make_runtime(Recipe(shards=2), "triton", torch.bfloat16), random_layer()
    layer.weight_packed = nn.Parameter(torch.zeros(128, 128, dtype=torch.uint8), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.ones(128, 1))
    like = runtime.stand_in(layer)
    runtime.process(layer, layer.weight_packed.data, layer.weight_scale.data)
    for name, value in vars(like).items():
        processed = getattr(layer, name)
        assert (value.shape, value.dtype) == (processed.shape, processed.dtype), name
    assert set(vars(like)) >= {"weight_device", "weight_scale", "transform_left", "transform_clip"}
    runtime.kernels(like, torch.zeros(3, 256, dtype=torch.bfloat16), None)


@pytest.mark.parametrize("bits", [4, 16])
def test_gpu_backend_refuses_float32(bits):
    with pytest.raises(UnsupportedError, match="no float32; serve with --dtype bfloat16"):
        make_runtime(Recipe(bits=bits), "triton", torch.float32)


@pytest.mark.parametrize("group_size, weight_bits", [(None, 4), (32, 4), (128, 4), (32, 3), (None, 2)])
def test_weight_only_kernel_gets_vllms_layout(group_size, weight_bits):
    """vLLM's CPU has a 4-bit weight kernel that takes the same layout as Machete and Marlin."""
    layer = random_layer(shards=1, clip=False)
    top = 2 ** (weight_bits - 1)
    codes = torch.randint(-top, top, (128, 256), dtype=torch.int8)
    scale = (0.1 * torch.rand(128, 256 // (group_size or 256))).bfloat16().float()
    recipe = Recipe(bits=16, weight_bits=weight_bits, group_size=group_size)
    runtime = make_runtime(recipe, "triton", torch.bfloat16)
    left, right = layer.transform_left, layer.transform_right
    runtime.process(layer, pack_codes(codes, weight_bits), scale)
    x = torch.randn(7, 256).bfloat16()
    actual = runtime.apply(layer, x, None)
    weight = dequantize_weight_ref(codes, scale)
    expected = F.linear(kron_ref(x, left, right).float(), weight)
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < 0.01  # bf16 products; a misplaced nibble would give about 1


def test_weight_only_kernel_layout_bit_by_bit():
    start_single_process()
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 1)
    seen = {}
    kernel = SimpleNamespace(process_weights_after_loading=lambda layer: seen.update(layer._parameters))
    only = object.__new__(_compat.WeightOnlyKernel)
    only._kernel = kernel
    only.process(nn.Module(), pack_int4(codes), torch.ones(2, 1), torch.bfloat16)
    words = seen["weight_packed"].data
    assert words.dtype == torch.int32 and words.shape == (2, 2)
    nibbles = (words.unsqueeze(-1) >> (4 * torch.arange(8))) & 0xF
    assert torch.equal(nibbles.flatten(1) - 8, codes.to(torch.int64))
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)
    wide = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    only.process(nn.Module(), wide, torch.ones(1, 1), torch.bfloat16)
    words = seen["weight_packed"].data
    assert ((words.unsqueeze(-1) >> (8 * torch.arange(4))) & 0xFF).tolist() == [[[0, 127, 128, 255]]]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_models_on_the_gpu_backend_equal_the_torch_backend(tmp_path, monkeypatch, bits):
    recipe = Recipe(
        "Qwen2", bits=bits, group_size=32 if bits == 16 else None, shards=2, dtype=torch.bfloat16
    )
    write_checkpoint(tmp_path, recipe)
    blocks = []
    for name in ("torch", "triton"):
        monkeypatch.setattr(config, "choose_backend", lambda _, name=name: Choice(name, "test"))
        blocks.append(load_model(tmp_path).model.layers[0])
    for site in SITES:
        layers = [block.get_submodule(site.module) for block in blocks]
        x = torch.randn(5, layers[0].input_size).bfloat16()
        expected, actual = (layer(x)[0] for layer in layers)
        if bits < 16:
            assert torch.equal(actual, expected)
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.01
