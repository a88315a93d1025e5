"""A chain of operators on the GPU: bit for bit its operators, recorded, replayed and in a CUDA graph."""

import json

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from vllm_flatquant.chaining import chain_operators
from vllm_flatquant.kernels.chain import _program, chain
from vllm_flatquant.kernels.jit import room
from vllm_flatquant.kernels.pack import pack_device

OPS = torch.ops.flatquant
HIDDEN = 1024


def decoder(x, residual, norm, heads, left, right, wide_left, wide_right, clip, o, o_scale, gate_up, gate_up_scale,
            down, down_scale):  # fmt: skip
    """From attention's output to the next norm's residual, as a layer of a served model has it."""
    dtype = x.dtype
    codes, scale = OPS.kron_quant(x, heads, None, clip, 4)
    y = OPS.w4_gemm(codes, scale, o, o_scale, None, dtype)
    codes, scale, total = OPS.rmsnorm_kron_quant(y, residual, norm, 1e-5, left, right, clip, 4)
    y = OPS.w4_gemm(codes, scale, gate_up, gate_up_scale, None, dtype)
    codes, scale = OPS.silu_mul_kron_quant(y, wide_left, wide_right, clip, 4)
    y = OPS.w4_gemm(codes, scale, down, down_scale, None, dtype)
    codes, scale, total = OPS.rmsnorm_kron_quant(y, total, norm, 1e-5, left, right, clip, 4)
    return OPS.w4_gemm(codes, scale, o, o_scale, None, dtype), total


def weights(seed, dtype, wide):
    generator = torch.Generator("cuda").manual_seed(seed)

    def factor(n):
        square = torch.randn(n, n, device="cuda", generator=generator)
        return torch.linalg.qr(square)[0][None].to(dtype).contiguous()

    def packed(n, k):
        codes = torch.randint(-8, 8, (n, k), device="cuda", dtype=torch.int8, generator=generator)
        return pack_device(codes, 1), torch.rand(n, 1, device="cuda", generator=generator) / k

    return [
        torch.rand(HIDDEN, device="cuda", generator=generator).to(dtype),
        *[factor(n) for n in (8, 32, 32, wide // 128, 128)],
        torch.tensor([0.9], device="cuda"),
        *packed(HIDDEN, HIDDEN),
        *packed(2 * wide, HIDDEN),
        *packed(HIDDEN, wide),
    ]


def activations(tokens, dtype):
    return [torch.randn(tokens, HIDDEN, device="cuda").to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "wide, counts",
    [(3584, (1, 3, 17, 64, 129, 257, 2048)), (14336, (17, 257))],  # the second: the Hopper form of SiLU
)
def test_chain_is_its_operators(dtype, wide, counts):
    layers = [weights(seed, dtype, wide) for seed in range(2)]
    for tokens in counts:
        module = make_fx(decoder, tracing_mode="fake")(*activations(tokens, dtype), *layers[0])
        assert chain_operators(module.graph) == 8
        module.recompile()
        text = next(n.args[1] for n in module.graph.nodes if "chain" in str(n.target))
        recordings = _program(text).recordings
        for turn in range(6):  # layers take turns, tensors move
            inputs = [*activations(tokens, dtype), *layers[turn % 2]]
            expected = decoder(*inputs)
            for actual, wanted in zip(module(*inputs), expected, strict=True):
                assert torch.equal(actual, wanted), f"{tokens} tokens, turn {turn}"
            assert len(recordings) == 1 and None not in recordings.values()
        static = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = module(*static)
        for x in static[:2]:
            x.normal_()
        graph.replay()
        for actual, wanted in zip(results, decoder(*static), strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("wide", [3584, 14336])
def test_recording_serves_every_number_of_tokens_with_its_room(wide):
    """A recording made for one number is started for others: bit for bit the operators, up to the edges of its room."""
    layer = weights(0, torch.bfloat16, wide)
    inputs = [*activations(300, torch.bfloat16), *layer]
    module = make_fx(decoder, tracing_mode="fake")(*inputs)
    assert chain_operators(module.graph) == 8
    call = next(node for node in module.graph.nodes if "chain" in str(node.target))
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    order = [names.index(node.name) for node in call.args[0]]
    program = json.loads(call.args[1])
    for like, number in zip(program["inputs"], order, strict=True):
        if number < 2:  # as a graph for any number of tokens has it
            like[1] = like[2] = None
    text = json.dumps(program)
    numbers = (
        1,  # whose kernel has no number of tokens among its arguments
        300,
        257,
        319,
        320,
        321,
        383,
        384,
        513,
        530,
        576,
        600,
        1025,
        1088,
        2047,
        2048,
        4200,
        4224,
        256,
        255,
    )
    for tokens in numbers:
        inputs = [*activations(tokens, torch.bfloat16), *layer]
        expected = decoder(*inputs)
        for turn in range(2):
            results = chain([inputs[i] for i in order], text)
            for actual, (_, _, part) in zip(results, program["results"], strict=True):
                wanted = expected[0] if part is None else expected[1]
                assert torch.equal(actual, wanted), f"{tokens} tokens, turn {turn}"
    recordings = _program(text).recordings
    assert len(recordings) == len({room(t) for t in numbers}) and None not in recordings.values()
