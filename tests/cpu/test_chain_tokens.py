"""Recordings that serve every number of tokens with the same room: nothing but an argument ``t`` may follow the tokens."""

import json

import pytest
import torch

pytest.importorskip("triton")
from vllm_flatquant.kernels import (
    chain,
    jit,
    kron,
    kron_quant,
    replay,
    rmsnorm_kron_quant,
    silu_mul_kron_quant,
    w4_gemm,
    w4_gemm_hopper,
    w4_gemv,
)
from vllm_flatquant.kernels.tile_table import TABLE
from vllm_flatquant.kernels.tiles import PLAIN

from .address_kernels import Kernel, pretend_device, program

HIDDEN, WIDE, QKV = 4096, 14336, 6144


def test_room_is_a_step_that_holds_the_tokens():
    rooms = [jit.room(t) for t in range(9000)]
    assert rooms[: jit.EXACT + 1] == list(range(jit.EXACT + 1))
    for t, room in enumerate(rooms[jit.EXACT + 1 :], jit.EXACT + 1):
        assert room % jit.STEP == 0 and t <= room < t + jit.STEP


def test_token_tiles_beyond_exact_are_whole_steps():
    """Then the tokens need as many tiles as their room, and a grid is the same for both."""
    assert all(tile.bm % jit.STEP == 0 for tokens, tile in PLAIN.items() if tokens > jit.EXACT)
    for rows in TABLE.values():
        for tiles in rows.values():
            beyond = [t for t in tiles if t > jit.EXACT] or [
                max(tiles)
            ]  # the last serves what is beyond
            assert all(tiles[t][0] % jit.STEP == 0 for t in beyond)


class Unstarted:
    """Stands in for a kernel: starts nothing. Its variants are told apart by the compile-time arguments."""

    def __init__(self, kernel):
        self.arg_names, self.variants = kernel.arg_names, {}

    def __getitem__(self, grid):
        def start(*args, **meta):
            return self.variants.setdefault(tuple(meta.items()), self)

        return start


@pytest.fixture
def card(monkeypatch):
    """A card to launch on that is not there: ``card(hopper, name)``."""
    from vllm_flatquant.kernels import silu_mul_kron_quant_hopper

    modules = [
        jit,
        kron,
        kron_quant,
        rmsnorm_kron_quant,
        silu_mul_kron_quant,
        silu_mul_kron_quant_hopper,
    ]
    modules += [w4_gemm, w4_gemm_hopper, w4_gemv]

    def pretend(is_hopper, name="NVIDIA H100 80GB HBM3"):
        jit._COMPILED.clear()
        kron._plan.cache_clear()
        pretended = {
            "hopper": lambda _: is_hopper,
            "multiprocessors": lambda _: 132,
            "has_gluon": lambda _: True,
            "_name": lambda _: name if is_hopper else "NVIDIA A100-SXM4-80GB",
            "_on_chip": lambda _: 230000 if is_hopper else 164000,
            "INTERPRET": False,
        }
        for module in modules:
            for key, value in pretended.items():
                if hasattr(module, key):
                    monkeypatch.setattr(module, key, value)
            for key, value in vars(module).items():
                if key.startswith("_") and key.endswith("_kernel"):
                    monkeypatch.setattr(module, key, Unstarted(value))

    monkeypatch.setattr(jit, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(w4_gemm_hopper, "_COUNTERS", {})
    monkeypatch.setattr(jit, "_PERSISTENT", [])
    yield pretend
    kron._plan.cache_clear()


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def packed(n, k, shards):
    return empty(k // 128, n, 64, dtype=torch.uint8), empty(n, 1, dtype=torch.float32)


def layer(tokens, shards):
    """Inputs of ``decoder``, in the shapes of an 8B model; those with a row for each token come first."""
    heads, left = 32 // shards, WIDE // 128 // shards
    factors = [empty(1, 64, 64), empty(1, 64, 64), empty(shards, heads, heads)]
    factors += [empty(shards, left, left), empty(shards, 128, 128)]
    clips = [empty(1, dtype=torch.float32), empty(shards, dtype=torch.float32)]
    weights = [packed(QKV, HIDDEN, 1), packed(HIDDEN, HIDDEN, shards), packed(2 * WIDE, HIDDEN, 1)]
    weights.append(packed(HIDDEN, WIDE, shards))
    return [
        empty(tokens, HIDDEN),
        empty(tokens, HIDDEN),
        empty(HIDDEN),
        *factors,
        *clips,
        *sum(weights, ()),
    ]


STEPS = [  # a layer from attention to the next one, on the inputs above
    ["kron_quant", [["in", 0], ["in", 5], None, ["in", 9], 4]],
    ["w4_gemm", [["out", 0, 0], ["out", 0, 1], ["in", 12], ["in", 13], None, ["dtype", "bfloat16"]]],
    ["rmsnorm_kron_quant", [["out", 1, None], ["in", 1], ["in", 2], 1e-5, ["in", 3], ["in", 4], ["in", 8], 4]],
    ["w4_gemm", [["out", 2, 0], ["out", 2, 1], ["in", 14], ["in", 15], None, ["dtype", "bfloat16"]]],
    ["silu_mul_kron_quant", [["out", 3, None], ["in", 6], ["in", 7], ["in", 9], 4]],
    ["w4_gemm", [["out", 4, 0], ["out", 4, 1], ["in", 16], ["in", 17], None, ["dtype", "bfloat16"]]],
    ["rmsnorm_kron_quant", [["out", 5, None], ["out", 2, 2], ["in", 2], 1e-5, ["in", 3], ["in", 4], ["in", 8], 4]],
    ["w4_gemm", [["out", 6, 0], ["out", 6, 1], ["in", 10], ["in", 11], None, ["dtype", "bfloat16"]]],
]  # fmt: skip
RESULTS = [["out", 7, None], ["out", 6, 2]]


def recorded(tokens, shards):
    """What a recording for ``tokens`` consists of but for where memory is, whether it serves the room, and the shapes
    of the results."""
    inputs = layer(tokens, shards)
    like = [["", None, None] if i < 2 else ["", [*x.shape], []] for i, x in enumerate(inputs)]
    program = chain.Program(json.dumps({"inputs": like, "steps": STEPS, "results": RESULTS}))
    recorder = replay.Recorder(inputs, program.changing, tokens)
    with jit.recording(recorder):
        results = program.interpret("cuda", inputs)
    assert recorder.finish(results) is not None
    blocks = [replay._span(block) for block in recorder._blocks]
    given = [replay._span(x) for x in inputs]

    def seen(argument):
        span = replay._span(argument)
        if span is None:
            return argument
        at = replay._find((span[0], span[0]), blocks) or replay._find((span[0], span[0]), given)
        if hasattr(argument, "block_shape"):
            return "descriptor", at, [*argument.shape], [*argument.strides], [*argument.block_shape]
        return "pointer", at, argument.dtype

    starts = []
    for start in recorder._starts:
        assert start.args[start.tokens] == tokens
        args = [seen(x) for i, x in enumerate(start.args) if i != start.tokens]
        starts.append((start.compiled, start.grid, args))
    memory = [(tuple(block.shape), block.dtype) for block in recorder._blocks]
    return (starts, memory), recorder.serves_room(results), [tuple(x.shape) for x in results]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("is_hopper", [True, False])
def test_nothing_else_follows_the_tokens(card, is_hopper, shards):
    """What is started for one number of tokens is, but for ``t``, what is started for all with the same room."""
    card(is_hopper)
    assert recorded(320, shards)[0] != recorded(321, shards)[0]  # the comparison sees what differs
    for room in (320, 512, 576, 1024, 1088, 2048, 2112, 4224, 8192):
        wanted, serves, _ = recorded(room, shards)
        assert serves and len(wanted[0]) == 8
        for tokens in (room - 63, room - 62, room - 17, room - 1):
            found, serves, shapes = recorded(tokens, shards)
            assert serves and found == wanted
            assert shapes == [(tokens, QKV), (tokens, HIDDEN)]


def test_small_numbers_of_tokens_are_laid_out_exactly(card):
    """What CUDA graphs are made of: no row more than there are tokens, but for the codes."""
    card(True)
    for tokens in (1, 17, 129, 255, 256):
        (_, memory), _, _ = recorded(tokens, 1)
        assert {shape[0] for shape, dtype in memory if dtype in (torch.bfloat16, torch.float32)} == {
            tokens
        }


@pytest.mark.parametrize("first", [1, 2, None])
def test_one_token_leaves_the_rooms_shared(card, monkeypatch, first):
    """Its kernel has no number of tokens among its arguments, nor need it: up to 256 a room is one number."""
    card(True, "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(replay, "Launch", lambda *_: None)
    monkeypatch.setattr(replay.Replay, "run", lambda *_: [])
    monkeypatch.setattr(chain.Program, "_check", lambda *_: None)
    inputs = layer(400, 1)
    like = [["", None, None] if i < 2 else ["", [*x.shape], []] for i, x in enumerate(inputs)]
    made = chain.Program(json.dumps({"inputs": like, "steps": STEPS, "results": RESULTS}))
    for tokens in ([first] if first else []) + list(range(257, 321)):
        made.run([x[:tokens] for x in inputs[:2]] + inputs[2:])
    assert (first == 1) == bool(w4_gemv._w4_gemv_kernel.variants)
    assert not made.exact and len(made.recordings) == 1 + bool(first)


@pytest.mark.parametrize("what", [None, "codes", "weight"])
@pytest.mark.parametrize("tokens", [16, 64, 300])
def test_unaligned_memory_goes_to_the_plain_kernel(card, what, tokens):
    """Bulk loads cannot take it. Nothing is asked for ahead by one either."""
    card(True)

    def memory(name, dtype, *shape):
        size, shift = torch.Size(shape).numel(), 8 * (name == what)
        return empty(size + shift, dtype=dtype)[shift:].view(shape)

    codes = memory("codes", torch.int8, tokens, HIDDEN)
    weight = memory("weight", torch.uint8, HIDDEN // 128, QKV, 64)
    scale, weight_scale = empty(tokens, 1, dtype=torch.float32), empty(QKV, 1, dtype=torch.float32)
    args = codes, scale, weight, weight_scale, None
    assert w4_gemm._w4_gemm_cuda(*args, torch.bfloat16).shape == (tokens, QKV)
    started = w4_gemm_hopper._w4_gemm_hopper_kernel.variants, w4_gemm._w4_gemm_kernel.variants
    assert [len(variants) for variants in started] == ([1, 0] if what is None else [0, 1])
    if what is not None:
        out, ahead = empty(tokens, QKV), PLAIN[16]._replace(prefetch=4)
        w4_gemm.run_tile(*args, out, ahead)
        asked = {dict(variant).get("PREFETCH", 0) for variant in started[1]}  # (): one that was known
        assert asked == {0, 4 * (what == "codes")}
        with pytest.raises(jit.Unaligned, match="multiple of 16 bytes"):
            w4_gemm.run_tile(*args, out, w4_gemm._tile(codes.device, tokens, QKV, HIDDEN, 1))


KERNEL = Kernel("t", 4)


def add(a, b, factor):
    t = a.shape[0]
    out = jit.empty((jit.room(t), 4), torch.float32, a.device)
    jit.launch(KERNEL, (1,), out, a, b, t, FACTOR=factor)
    return jit.leading(out, t)


class Descriptor:
    """Rows of an input, as bulk loads take them."""

    block_shape, layout = (1, 4), None

    def __init__(self, base):
        self.base, self.shape, self.strides = base, [*base.shape], [4, 1]


def add_described(a, b, factor):
    t = a.shape[0]
    out = jit.empty((jit.room(t), 4), torch.float32, a.device)
    jit.launch(KERNEL, (1,), out, Descriptor(a), b, t, FACTOR=factor)
    return jit.leading(out, t)


def add_tight(a, b, factor):
    out = jit.empty(a.shape, torch.float32, a.device)
    jit.launch(KERNEL, (1,), out, a, b, a.shape[0], FACTOR=factor)
    return out


def add_described_tight(a, b, factor):
    """On memory with room for more, a descriptor of no more rows than there are tokens."""
    t, sums = a.shape[0], add(a, b, factor)
    out = jit.empty((jit.room(t), 4), torch.float32, a.device)
    jit.launch(KERNEL, (1,), out, Descriptor(sums), b, t, FACTOR=0)
    return jit.leading(out, t)


@pytest.fixture
def device(monkeypatch):
    operators = add, add_described, add_tight, add_described_tight
    pretend_device(monkeypatch, **{operator.__name__: operator for operator in operators})


IN = [["in", 0], ["in", 1]]


def test_recording_serves_its_room(device, monkeypatch):
    steps = [["add", [*IN, 3]], ["add", [["out", 0, None], ["in", 0], 2]]]
    made = program(*steps, results=[["out", 1, None], ["out", 0, None]])
    interpret, interpreted = made.interpret, []
    monkeypatch.setattr(made, "interpret", lambda *args: interpreted.append(1) or interpret(*args))
    numbers = (255, 256, 257, 300, 319, 320, 321, 384, 257, 320, 8129, 8192, 256)
    for tokens in numbers:
        a, b = torch.randn(tokens, 4), torch.randn(tokens, 4)
        last, first = made.run([a, b])
        assert torch.equal(first, a + 3 * b) and torch.equal(last, first + 2 * a)
        assert first.is_contiguous() and first.stride() == (4, 1)
    assert len(interpreted) == len(made.recordings) == len({jit.room(t) for t in numbers}) == 5


def test_rows_of_an_input_in_a_descriptor_are_recorded_exactly(device):
    """A bulk load asks for as many rows as the recording says, and there are no more than tokens."""
    made = program(["add_described", [*IN, 3]], results=[["out", 0, None]])
    for tokens in (300, 301, 300, 320, 301):
        a, b = torch.randn(tokens, 4), torch.randn(tokens, 4)
        assert torch.equal(made.run([a, b])[0], a + 3 * b)
    assert made.exact and len(made.recordings) == 3


@pytest.mark.parametrize("name", ["add_tight", "add_described_tight"])
def test_memory_without_room_is_recorded_exactly(device, name):
    """A kernel would write, or a bulk load leave out, what lies behind."""
    made = program([name, [*IN, 3]], results=[["out", 0, None]])
    for tokens in (300, 320, 300, 257):
        a, b = torch.randn(tokens, 4), torch.randn(tokens, 4)
        assert torch.equal(made.run([a, b])[0], a + 3 * b)
    assert made.exact and len(made.recordings) == 3


def test_rows_that_differ_between_inputs_are_recorded_exactly(device):
    made = program(["add", [*IN, 1]], results=[["out", 0, None]], count=3)
    for tokens, others in ((300, 5), (301, 5), (300, 6), (300, 5)):
        a, b = torch.randn(tokens, 4), torch.randn(tokens, 4)
        assert torch.equal(made.run([a, b, torch.randn(others, 4)])[0], a + b)
    assert len(made.recordings) == 3


def test_a_recording_of_another_gpu_is_refused(device, monkeypatch):
    made = program(["add", [*IN, 3]], results=[["out", 0, None]])
    inputs = [torch.randn(300, 4), torch.randn(300, 4)]
    made.run(inputs)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    with pytest.raises(RuntimeError, match="on cuda:1, the current device is cuda:0"):
        made.run(inputs)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert torch.equal(made.run(inputs)[0], inputs[0] + 3 * inputs[1])
