"""Runs of operators as one call: the graph pass on CPU implementations, and replaying kernels with other pointers."""

import inspect
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_flatquant.chaining import chain_operators
from vllm_flatquant.kernels import chain as chain_module
from vllm_flatquant.kernels import jit, replay
from vllm_flatquant.kernels.pack import pack_device

from .address_kernels import Compiled, Kernel, pretend_device, program
from .tiny_checkpoint import random_factor

OPS = torch.ops.flatquant
TOKENS, WIDTH, WIDE = 6, 64, 128


def weight(outputs, inputs):
    """Packed int4 weights and their scales."""
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    return pack_device(codes, 1), torch.rand(outputs, 1) / inputs


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return {
        "x": torch.randn(TOKENS, WIDTH).bfloat16(),
        "residual": torch.randn(TOKENS, WIDTH).bfloat16(),
        "norm": torch.rand(WIDTH).bfloat16(),
        "left": random_factor(1, 8).bfloat16(),
        "wide": random_factor(1, 16).bfloat16(),
        "clip": torch.tensor([0.9]),
        "heads": weight(WIDTH, WIDTH),
        "gate_up": weight(2 * WIDE, WIDTH),
        "down": weight(WIDTH, WIDE),
    }


def decoder(between=lambda y: y):
    """Transform, product, norm, product, SiLU, product; ``between`` stands after the first product."""

    def function(x, residual, norm, left, wide, clip, heads, gate_up, down):
        codes, scale = OPS.kron_quant(x, left, None, clip, 4)
        y = between(OPS.w4_gemm(codes, scale, *heads, None, torch.bfloat16))
        codes, scale, total = OPS.rmsnorm_kron_quant(y, residual, norm, 1e-5, left, left, clip, 4)
        y = OPS.w4_gemm(codes, scale, *gate_up, None, torch.bfloat16)
        codes, scale = OPS.silu_mul_kron_quant(y, left, wide, clip, 8)
        return OPS.w4_gemm(codes, scale, *down, None, torch.bfloat16), total

    return function


def chained(function, layer, mode="fake"):
    """The graph after the pass, how many operators it replaced, and the results before and after."""
    inputs = list(layer.values())
    module = make_fx(function, tracing_mode=mode)(*inputs)
    before = module(*inputs)
    count = chain_operators(module.graph)
    module.graph.lint()
    module.recompile()
    return module.graph, count, before, module(*inputs)


def calls(graph):
    return [n.target.name() for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("between", [lambda y: y, lambda y: y.view(-1, WIDTH)])
def test_a_layer_becomes_one_call(layer, between, mode):
    graph, count, before, after = chained(decoder(between), layer, mode)
    assert count == 6
    assert [name for name in calls(graph) if "flatquant" in name] == ["flatquant::chain"]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)
    program = json.loads(next(n for n in graph.nodes if "chain" in str(n.target)).args[1])
    moving = sum(shape is None for _, shape, _ in program["inputs"])
    assert moving == (11 if mode == "symbolic" else 0)


@pytest.mark.parametrize("between", [lambda y: y + 1, lambda y: y.view(2, -1).view(TOKENS, WIDTH)])
def test_another_operator_splits_a_chain(layer, between):
    graph, count, before, after = chained(decoder(between), layer)
    assert count == 6 and calls(graph).count("flatquant::chain") == 2
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_what_does_not_touch_the_chain_stays_before_it(layer):
    """A norm weight that is computed between two operators of a chain, from other inputs."""

    def function(x, residual, norm, left, wide, clip, heads, gate_up, down):
        codes, scale = OPS.kron_quant(x, left, None, clip, 4)
        y = OPS.w4_gemm(codes, scale, *heads, None, torch.bfloat16)
        return OPS.rmsnorm_kron_quant(y, None, norm * 2, 1e-5, left, left, clip, 4)[:2]

    graph, count, before, after = chained(function, layer)
    assert count == 3 and calls(graph) == ["aten::mul.Tensor", "flatquant::chain"]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_single_operator_is_left_alone(layer):
    def function(x, residual, norm, left, wide, clip, heads, gate_up, down):
        codes, scale = OPS.kron_quant(x, left, None, clip, 4)
        return codes.float() * scale

    graph, count, *_ = chained(function, layer)
    assert count == 0 and "flatquant::chain" not in calls(graph)


def test_intermediate_read_elsewhere_is_a_result(layer):
    """Codes that something else reads too."""

    def function(x, residual, norm, left, wide, clip, heads, gate_up, down):
        codes, scale = OPS.kron_quant(x, left, None, clip, 4)
        y = OPS.w4_gemm(codes, scale, *heads, None, torch.bfloat16)
        return codes.float().sum(), scale, y

    _, count, before, after = chained(function, layer)
    assert count == 2
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_no_call_moves_behind_what_changes_its_input(layer):
    """In place now, or again once vLLM undoes functionalization, which does not look at other readers."""

    def function(x, residual, norm, left, wide, clip, heads, gate_up, down):
        codes, scale = OPS.kron_quant(x, left, None, clip, 4)
        x.add_(1)
        return OPS.w4_gemm(codes, scale, *heads, None, torch.bfloat16), x + 0

    inputs = list(layer.values())
    wanted = function(layer["x"].clone(), *inputs[1:])
    module = make_fx(function, tracing_mode="fake")(*inputs)
    chain_operators(module.graph)
    module.recompile()
    for actual, expected in zip(module(layer["x"].clone(), *inputs[1:]), wanted, strict=True):
        assert torch.equal(actual, expected)


def test_chain_passes_opcheck(layer):
    graph, *_ = chained(decoder(), layer)
    node = next(n for n in graph.nodes if "chain" in str(n.target))
    flat = [layer[k] for k in ("x", "residual", "norm", "left", "wide", "clip")]
    flat += [*layer["heads"], *layer["gate_up"], *layer["down"]]
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    inputs = [flat[names.index(n.name)] for n in node.args[0]]
    torch.library.opcheck(OPS.chain.default, (inputs, node.args[1]))


KERNEL = Kernel("count")


class Descriptor:
    block_shape = (1, 4)


def add(a, b, factor):
    out = jit.empty(a.shape, torch.float32, a.device)
    jit.launch(KERNEL, (1,), out, a, b, a.numel(), FACTOR=factor)
    return out


def add_scaled(a, b, factor):
    """The same through memory in between, where "slow" by an operator of PyTorch."""
    if factor == 0:
        return a.clone()
    return add(add(a, b, factor - 1), b, 1)


@pytest.fixture
def device(monkeypatch):
    pretend_device(monkeypatch, add=add, add_scaled=add_scaled)


IN = [["in", 0], ["in", 1]]


def test_replay_gives_what_the_operators_give(device, monkeypatch):
    made = program(
        ["add_scaled", [*IN, 3]],
        ["add", [["out", 0, None], ["in", 0], 2]],
        ["add", [["out", 1, None], ["out", 0, None], -1]],
        results=[["out", 2, None], ["out", 0, None]],
    )
    for number, tokens in enumerate((5, 5, 8, 5, 8)):
        a, b = torch.randn(tokens, 4), torch.randn(tokens, 4)
        if number in (3, 4):  # by now only addresses differ: nothing else may run
            monkeypatch.setattr(made, "interpret", None)
        last, first = made.run([a, b])
        torch.testing.assert_close(first, a + 3 * b)
        torch.testing.assert_close(last, 2 * a)
    assert len(made.recordings) == 2


def test_memory_in_between_is_used_again(device):
    steps = [["add", [["in", 0], ["in", 1], 1]]]
    steps += [["add", [["out", i, None], ["in", 1], 1]] for i in range(9)]
    made = program(*steps, results=[["out", 9, None]])
    a, b = torch.zeros(100), torch.ones(100)
    for _ in range(2):
        assert torch.equal(made.run([a, b])[0], torch.full((100,), 10.0))
    (recording,) = made.recordings.values()
    assert recording._workspace < 3 * 512


def test_operator_that_fell_back_is_not_replayed(device):
    made = program(
        ["add_scaled", [*IN, 0]], ["add", [["out", 0, None], ["in", 1], 1]], results=[["out", 1, None]]
    )
    for _ in range(3):
        a, b = torch.randn(8), torch.randn(8)
        torch.testing.assert_close(made.run([a, b])[0], a + b)
    assert list(made.recordings.values()) == [None]


def test_inputs_with_one_address_are_not_recorded(device):
    made = program(["add", [*IN, 2]], results=[["out", 0, None]])
    a, b = torch.randn(8), torch.randn(8)
    torch.testing.assert_close(made.run([a, a])[0], 3 * a)
    assert not made.recordings
    for _ in range(2):
        torch.testing.assert_close(made.run([a, b])[0], a + 2 * b)
        torch.testing.assert_close(made.run([b, b])[0], 3 * b)


def test_inputs_that_overlap_are_not_recorded(device):
    """Where one lies within another, nobody could tell which of them a kernel was given."""
    steps = [["add", [["in", 1], ["in", 1], 0]], ["add", [["out", 0, None], ["in", 0], 0]]]
    made = program(*steps, results=[["out", 1, None]])
    room = torch.randn(16)
    for outer, inner in (
        (room, room[8:]),
        (room.clone(), torch.randn(8)),
        (room.clone(), torch.randn(8)),
    ):
        assert torch.equal(made.run([outer, inner])[0], inner)
    assert len(made.recordings) == 1


def test_recording_keeps_no_tensor(device):
    """Nor the memory behind a descriptor, where Triton's own launcher gets one at every start."""
    base = torch.zeros(4)
    descriptor = Descriptor()
    descriptor.base, descriptor.shape, descriptor.strides = base, [1, 4], [4, 1]
    start = replay.Start(Compiled(), (1,), [descriptor, base, 3])
    made = replay.Launch(start, {0: replay.Place(0, 0), 1: replay.Place(0, 0)})
    address, gone = base.data_ptr(), weakref.ref(base)
    del base, start, descriptor
    assert gone() is None
    assert made._args[0].base.data_ptr() == made._args[1] == address


def test_recordings_share_what_they_know_of_weights(device):
    """Another number of tokens must not encode the descriptors of every layer's weights again, nor keep them for ever."""
    started = []

    class Noted:
        def __getitem__(self, grid):
            return lambda *args, stream: started.append(args[0])

    def recorded(rows):
        descriptor = Descriptor()
        descriptor.base, descriptor.shape, descriptor.strides = torch.zeros(4), [rows, 4], [4, 1]
        return replay.Launch(replay.Start(Noted(), (1,), [descriptor]), {0: replay.Place(0, 16)})

    one, same, other = recorded(1), recorded(1), recorded(2)
    for launch, pointer in ((one, 64), (one, 128), (one, 64), (same, 128), (other, 128), (other, 64)):
        launch.run(7, [pointer], 0)
        assert started[-1].base.data_ptr() == pointer + 16
    assert started[0] is started[2] and started[1] is started[3]
    assert started[4].shape == [2, 4] and started[4] is not started[1]
    key = next(key for key, known in replay._ENCODED.items() if known is one._maps[0][-1])
    del one, launch
    assert len(replay._ENCODED[key]) == 2
    del same
    assert key not in replay._ENCODED


def test_c_launcher_is_called_with_what_triton_would_give_it(device, monkeypatch):
    """As Triton 3.6 wraps it where there are descriptors. What is encoded depends on the address, shape and metadata."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    started = []

    def encode(argument, meta):
        return [(argument.base.data_ptr(), meta["swizzle"]), *argument.shape, *argument.strides]

    def wrapped(launcher, tensordesc_meta):
        return lambda *args: launcher(tensordesc_meta, *args)

    def launch(swizzle):
        run = SimpleNamespace(
            launch=wrapped(lambda *args: started.append(args), [{"swizzle": swizzle}]),
            global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=True,
        )  # fmt: skip
        compiled = Hashed(run=run, function=11, packed_metadata=(4, 1))
        described = Descriptor()
        described.base, described.shape, described.strides = torch.zeros(4), [1, 4], [4, 1]
        start = replay.Start(compiled, (3, 2), [described, torch.zeros(2), 9])
        return replay.Launch(start, {0: replay.Place(0, 8), 1: replay.Place(1, 0)})

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(inspect, "isbuiltin", lambda _: True)
    for swizzle in (3, 1):
        launch(swizzle).run(7, [100, 200], 0)
        fixed = (3, 2, 1, 7, 11, False, True, None, None, (4, 1), None, None, None)
        assert started.pop() == (*fixed, (108, swizzle), 1, 4, 4, 1, 200, 9)


class Hashed(SimpleNamespace):
    __hash__ = object.__hash__


def test_recordings_are_for_one_shape_stride_and_alignment(device):
    made = program(["add", [*IN, 2]], results=[["out", 0, None]])
    room = torch.randn(64)
    for a in (room[:8], room[8:20], room[1:9], room[:8].view(2, 4)):
        b = torch.randn_like(a)
        for _ in range(2):
            torch.testing.assert_close(made.run([a, b])[0], a + 2 * b)
    assert len(made.recordings) == 3  # the one that is not aligned is never recorded


def test_inputs_must_be_what_the_program_was_made_for(device):
    text = {"inputs": [["float32", None, None], ["float32", [8], [1]]], "steps": [["add", [*IN, 2]]]}
    made = chain_module.Program(json.dumps(text | {"results": [["out", 0, None]]}))
    with pytest.raises(ValueError, match=r"input 1 of a chain is torch.float32 \(4,\)"):
        made.run([torch.zeros(4), torch.zeros(4)])


def test_stride_of_a_dimension_of_size_one_is_nobodys_business(device):
    text = {"inputs": [["float32", [1, 8], [8, 1]]] * 2, "steps": [["add", [*IN, 2]]]}
    made = chain_module.Program(json.dumps(text | {"results": [["out", 0, None]]}))
    a, b = torch.randn(1, 8), torch.randn(1, 8).as_strided((1, 8), (1, 1))
    for _ in range(2):
        torch.testing.assert_close(made.run([a, b])[0], a + 2 * b)


def test_number_of_recordings_is_bounded(device, monkeypatch):
    monkeypatch.setattr(chain_module, "_KEPT", 3)
    made = program(["add", [*IN, 2]], results=[["out", 0, None]])
    for tokens in (1, 2, 3, 4, 5, 1):
        a, b = torch.randn(tokens), torch.randn(tokens)
        torch.testing.assert_close(made.run([a, b])[0], a + 2 * b)
    assert len(made.recordings) == 3


def test_blocks_used_at_one_time_are_apart():
    blocks = {0: (0, 2, 1000), 1: (1, 3, 300), 2: (3, 5, 900), 3: (4, 4, 100), 4: (0, 5, 10)}
    offsets, total = replay._pack(blocks)
    for i, (first, last, size) in blocks.items():
        assert offsets[i] % 256 == 0 and offsets[i] + size <= total
        for j, (other_first, other_last, other_size) in blocks.items():
            if i < j and first <= other_last and other_first <= last:
                assert offsets[i] + size <= offsets[j] or offsets[j] + other_size <= offsets[i]
    assert total < 2300
