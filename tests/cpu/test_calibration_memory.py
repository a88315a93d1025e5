"""What training keeps in memory: gradients without intermediates, a bounded step, a failed capture given back."""

import logging
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_recipes import script
from tiny_model import make_model, random_tokens
from torch import nn

from vllm_flatquant.calibration import capture, matrices, rounding, steps, straight_through, train
from vllm_flatquant.calibration.block import TrainableBlock
from vllm_flatquant.calibration.matrices import MATRICES
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.streams import record_inputs
from vllm_flatquant.kernels.quantize import codes_ref, scale_ref

CPU = torch.device("cpu")
LiveBytes = script(Path(__file__).parents[2] / "benchmarks" / "live_bytes.py").LiveBytes


def with_autograd(z, bits, clip):
    """``fake_quantize`` as autograd differentiates the reference."""
    scale = scale_ref(z, bits, clip)
    return codes_ref(z, scale, bits, straight_through.round_ste) * scale.unsqueeze(-1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.7, "learned"])
def test_gradients_are_those_of_the_reference(bits, clip):
    torch.manual_seed(0)
    z = torch.randn(6, 2, 32)
    z[0, 0] = 0  # a scale of 1
    z[1, 0, :3] = torch.tensor([5.0, -5.0, 5.0])  # several largest
    upstream = torch.randn_like(z)
    found = []
    for function in (straight_through.fake_quantize, with_autograd):
        own = z.clone().requires_grad_()
        ratio = torch.tensor([0.6, 0.9], requires_grad=True) if clip == "learned" else clip
        out = function(own, bits, ratio)
        out.backward(upstream)
        found.append([out.detach(), own.grad] + ([ratio.grad] if clip == "learned" else []))
    assert torch.equal(found[0][0], found[1][0])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def make_block(folder, settings, length=24, **sizes):
    """A trainable block of a random model, its layer, and inputs [2, length, hidden]."""
    source = ModelSource(make_model(folder / "model", **sizes))
    recipe = make_recipe(**{"samples": 2, "seq_len": length, "batch_size": 2, "epochs": 2, **settings})
    x, kwargs = record_inputs(source, random_tokens(2, length), CPU)
    layer = source.load_block(0, CPU)
    target, stats = train.collect_stats(layer, source.arch, x, kwargs[0], 2, CPU)
    block = TrainableBlock(layer, source.arch, recipe, stats, seed=0)
    return SimpleNamespace(
        block=block, layer=layer, x=x, target=target, kwargs=kwargs[0], recipe=recipe, source=source
    )


@pytest.mark.parametrize(
    ("settings", "model_type"),
    [
        ({"kv": 4}, "llama"),
        ({"kv": 8, "shards": 2, "diag": ("o", "down")}, "qwen2"),
        ({"scheme": "w4a16", "group_size": 8, "matrix": "direct"}, "llama"),
        ({"transforms": ("qkv", "v"), "v_each_head": True, "v_matrix": "affine"}, "qwen3"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_recomputation_changes_no_number(tmp_path, monkeypatch, settings, model_type):
    made = make_block(tmp_path, settings, model_type=model_type)
    found = []
    for again in (True, False):
        if not again:
            for module in ("block", "sites"):
                name = f"vllm_flatquant.calibration.{module}.recomputed"
                monkeypatch.setattr(name, lambda function, *args: function(*args))
        made.block.zero_grad()
        loss = (made.layer(made.x, **made.kwargs) - made.target).square().mean()
        made.block.forget()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in made.block.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, mine), (expected_loss, expected) = found
    assert torch.equal(loss, expected_loss)
    assert mine.keys() == expected.keys() and len(mine) > 3
    assert any(g.any() for g in mine.values())
    for name in mine:
        assert torch.equal(mine[name], expected[name]), name


def step_memory(made, monkeypatch):
    """Bytes at the peak of a training step and after it, beyond what lives before it."""
    found = []

    class Watched(steps.Steps):
        def _eager(self, inputs):
            with LiveBytes() as live:
                result = super()._eager(inputs)
            found.append((live.peak, live.now))
            return result

    monkeypatch.setattr(train, "Steps", Watched)
    train.train_block(made.block, made.layer, made.x, made.target, made.kwargs, made.recipe, CPU)
    return found[-1]


def test_a_weight_is_kept_once(tmp_path, monkeypatch):
    """Few tokens: one rounded copy of each weight, and while a gradient is computed the way of one weight."""
    made = make_block(tmp_path, {}, length=2, hidden_size=192, intermediate_size=768)
    weights = [4 * made.block.linear(n).weight.numel() for n in made.source.arch.linears]
    peak, after = step_memory(made, monkeypatch)
    assert peak < sum(weights) + 6.8 * max(weights)
    assert after < 4 * 1.1 * sum(p.numel() for p in made.block.parameters()), "their gradients stay"


def test_an_activation_is_kept_once(tmp_path, monkeypatch):
    """Many tokens: gate, its SiLU, up, their product and its quantization; and the way of one site."""
    made = make_block(tmp_path, {}, length=128, hidden_size=48, intermediate_size=192)
    wide, narrow = 4 * 256 * 192, 4 * 256 * 96  # of q, k and v too
    peak, _ = step_memory(made, monkeypatch)
    assert peak < 11 * wide + 11 * narrow


def test_a_hessian_is_not_copied():
    """Kept: itself and its factor. On the way one more, and masks."""
    x = torch.randn(300, 256, dtype=torch.float64)
    hessian = x.T @ x
    cross, size = hessian.clone(), hessian.nbytes
    with LiveBytes() as live:
        sweep = rounding.prepare(hessian, 0.01)
        assert sweep.hessian is hessian and live.now < 1.1 * size and live.peak < 2.5 * size
        live.peak = live.now
        rounding.qronos(torch.randn(8, 256, dtype=torch.float64), torch.ones(8, 1), sweep, cross, 4)
    assert live.peak < 2.5 * size


@pytest.mark.parametrize("shape", [(16, 8), (17, 8), (2, 129), (1, 129)], ids=str)
@pytest.mark.parametrize("kind", ["svd", "direct", "orthogonal", "affine"])
def test_no_batch_is_left_to_magma(monkeypatch, kind, shape):
    """Each factored batch is one that a CUDA graph can record, and the matrices are those of one call for all."""
    own = MATRICES[kind](*shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in own.parameters():
            p.add_(0.1 * torch.randn_like(p))
    seen, upstream = [], torch.randn(shape[0], shape[1], shape[1])

    def results():
        own.zero_grad()
        p, inverse_t = own()
        (p * upstream + inverse_t * upstream).sum().backward()
        return [p.detach(), inverse_t.detach(), *(q.grad.clone() for q in own.parameters())]

    for name in ("inv_ex", "solve_ex"):
        exact = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda *m, f=exact: (seen.append(m[0].shape), f(*m))[1])
    apart = results()
    assert seen and all(s == 1 or (s <= 16 and n <= 128) for s, n, _ in seen)
    with monkeypatch.context() as patch:
        patch.setattr(matrices, "CUBLAS_SIZE", 1000)
        patch.setattr(matrices, "CUBLAS_BATCH", 1000)
        together = results()
    for mine, expected in zip(apart, together, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


class Stream:
    def wait_stream(self, other):
        pass


class Generator:
    """As far as a capture needs a GPU's."""

    def __init__(self):
        self.state = {"seed": 5, "capturing": False}

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state

    def clone_state(self):
        return dict(self.state)


@pytest.fixture
def gpu(monkeypatch):
    """Enough of a GPU for captures that run what they should record and then cannot end. calls: of the allocator,
    each with what ``alive()`` says then. stream: the current one. random: the generator, whose state at the time a
    capture spoils."""
    made = SimpleNamespace(
        calls=[], alive=lambda: False, stream=Stream(), ended=False, random=Generator()
    )

    class Graph:
        def pool(self):
            if not made.ended:
                raise RuntimeError("no capture has ended")

    @contextmanager
    def graph(given, pool, stream):
        made.stream = stream
        made.random.state["capturing"] = True
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def note(name):
        return lambda *args: made.calls.append((name, *args, made.alive()))

    for name, fake in {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 7),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: made.stream,
        "set_stream": lambda stream: setattr(made, "stream", stream),
        "current_device": lambda: 3,
        "synchronize": lambda device=None: None,
        "empty_cache": note("empty"),
        "default_generators": {3: made.random},
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", note("end"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", note("release"), raising=False)
    capture.warn_once.cache_clear()
    return made


@pytest.mark.parametrize("ended", [False, True], ids=["invalid", "ended"])
@pytest.mark.parametrize("fails", ["in_loss", "at_end"])
def test_a_failed_capture_gives_its_memory_back(gpu, monkeypatch, caplog, fails, ended):
    monkeypatch.setattr(steps, "missing_memory", lambda device: 0)
    gpu.ended = ended
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3))
    twin = nn.Parameter(p.detach().clone())
    data, seen = torch.randn(6, 5, 4), []

    def loss(x):
        y = x @ p
        seen.append(weakref.ref(y))
        if fails == "in_loss" and len(seen) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 896 MiB.\nMore.")
        return y.square().mean()

    gpu.alive = lambda: seen[3]() is not None or p.grad is not None
    main, random_state = gpu.stream, gpu.random.state
    trainer = steps.Steps(loss, [{"params": [p], "lr": 0.1}], lambda _: 1.0, CPU)
    expected = steps.Steps(
        lambda x: (x @ twin).square().mean(), [{"params": [twin], "lr": 0.1}], lambda _: 1.0, CPU
    )
    trainer.wanted, trainer.side = True, Stream()
    update = trainer.optimizer.step
    trainer.optimizer.step = lambda: update() if gpu.stream is main else None  # recorded, not done
    with caplog.at_level(logging.WARNING):
        for x in data:
            assert torch.equal(trainer.step(x), expected.step(x))
    assert torch.equal(p, twin)
    closed = [] if ended else [("end", 3, (0, 7), False), ("release", 3, (0, 7), False)]
    assert gpu.calls == [*closed, ("empty", False)], "nothing was alive when it was given back"
    assert gpu.stream is main
    assert gpu.random.state is random_state and random_state == {"seed": 5, "capturing": False}
    assert trainer.graph is None and not trainer.wanted
    assert len(seen) == 7, "one capture was tried"
    cause = (
        "CUDA out of memory. Tried to allocate 896 MiB." if fails == "in_loss" else "operation failed"
    )
    assert len(caplog.records) == 1 and cause in caplog.text and "run slower" in caplog.text


@pytest.mark.parametrize("free", [9.0, 13.0])
def test_a_graph_that_will_not_fit_is_not_tried(gpu, monkeypatch, caplog, free):
    """10 GB beyond what is allocated, and a fifth more for gaps."""
    numbers = {"max_memory_allocated": 14e9, "memory_allocated": 4e9}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    monkeypatch.setattr(capture, "free_memory", lambda device: free * 1e9)
    tried = []

    def captured(*args):
        tried.append(args)
        return SimpleNamespace(replay=lambda: None), torch.zeros(())

    monkeypatch.setattr(capture, "capture", captured)
    p = nn.Parameter(torch.ones(3))
    trainer = steps.Steps(lambda x: (p * x).sum(), [{"params": [p], "lr": 0.1}], lambda _: 1.0, CPU)
    trainer.wanted, trainer.side = True, Stream()
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            trainer.step(torch.ones(3))
    if free > 12:
        assert tried and not caplog.records
    else:
        assert not tried and "3 GB of GPU memory too little" in caplog.text
        assert trainer.step(torch.ones(3)).isfinite() and len(caplog.records) == 1


@pytest.fixture
def recorded(monkeypatch):
    """Captures that run nothing, as a GPU's, and replays that write what was returned then. Holds their number, and
    the streams of the captures."""
    made = SimpleNamespace(captures=0, replays=0, streams=[])

    def captured(function, drop, device, stream):
        made.captures += 1
        made.streams.append(stream)
        result = function().fill_(torch.nan)

        def replay():
            made.replays += 1
            result.copy_(function())

        return SimpleNamespace(replay=replay), result

    monkeypatch.setattr(capture, "wanted", lambda device: True)
    monkeypatch.setattr(capture, "capture", captured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    capture.warn_once.cache_clear()
    capture._stream.cache_clear()
    yield made
    capture._stream.cache_clear()


def codes(method):
    """Of a weight of 300 columns in blocks of 64: five, the last smaller."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 300).double(), torch.randn(900, 300).double()
    sweep = rounding.prepare(x.T @ x, 0.01, by_norm=True)
    scale = weight.abs().amax(dim=1, keepdim=True).float() / 7
    if method == "gptq":
        return rounding.gptq(weight, scale, sweep, 4, 64)
    return rounding.qronos(weight, scale, sweep, x.T @ x, 4, 64)


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_blocks_of_columns_are_replayed(request, method):
    expected = codes(method)
    recorded = request.getfixturevalue("recorded")
    assert torch.equal(codes(method), expected)
    assert (recorded.captures, recorded.replays) == (1, 3), (
        "the first and the smaller one ran as they are"
    )


def test_all_captures_share_a_stream(recorded, monkeypatch):
    """cuBLAS keeps a workspace for each stream, for good."""
    monkeypatch.setattr(steps, "wanted", lambda device: True)
    groups = [{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}]
    sides = [steps.Steps(torch.sum, groups, lambda _: 1.0, CPU).side for _ in range(2)]
    for _ in range(2):
        codes("gptq")
    assert recorded.captures == 2
    assert len({id(stream) for stream in (*sides, *recorded.streams)}) == 1


def test_rounding_that_cannot_be_captured_runs_slower(recorded, monkeypatch, caplog):
    expected = codes("gptq")

    def fails(*args):
        recorded.captures += 1
        raise capture.CaptureError("no")

    monkeypatch.setattr(capture, "capture", fails)
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(codes("gptq"), expected) for _ in range(2))
    assert recorded.captures == 3 and len(caplog.records) == 1
    assert "rounding of columns is not captured" in caplog.text and "slower: no" in caplog.text
