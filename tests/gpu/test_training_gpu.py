"""Training on a GPU: a captured step gives what eager steps give, and capture does happen."""

import gc
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "cpu"))
from tiny_model import make_model, random_tokens

from vllm_flatquant.calibration import capture, endtoend, train
from vllm_flatquant.calibration.attention import attention_forward
from vllm_flatquant.calibration.block import TrainableBlock
from vllm_flatquant.calibration.matrices import MATRICES
from vllm_flatquant.calibration.quantize import make_spec, quantize_block
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.steps import Steps
from vllm_flatquant.calibration.streams import record_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SMALL = {
    "samples": 7,
    "seq_len": 24,
    "batch_size": 2,
    "epochs": 4,
    "distill_epochs": 6,
}  # a short last batch
SCHEMES = [{"scheme": "w4a4", "kv": 4}, {"scheme": "w4a16"}]


@pytest.fixture
def both(monkeypatch, caplog):
    """Calls a function with captured and with eager steps; (captured, eager) results."""

    def call(module, function):
        results = []
        for graph in (True, False):
            made = []

            def steps(*args, graph=graph, made=made, **kwargs):
                made.append(Steps(*args, **kwargs, graph=graph))
                return made[-1]

            monkeypatch.setattr(module, "Steps", steps)
            with caplog.at_level(logging.WARNING):
                results.append(function())
            assert [s.graph is not None for s in made] == [graph] * len(made)
        assert not caplog.records
        return results

    return call


@pytest.mark.parametrize("settings", SCHEMES, ids=lambda s: s["scheme"])
@pytest.mark.parametrize("matrix", ["svd", "direct", "orthogonal"])
def test_block_training(tmp_path, both, settings, matrix):
    device = torch.device("cuda")
    source = ModelSource(make_model(tmp_path / "model"))
    recipe = make_recipe(**SMALL, **settings, matrix=matrix)
    x, kwargs = record_inputs(source, random_tokens(7, 24), device)
    x = x.to(device)

    def losses():
        layer = source.load_block(0, device)
        target, stats = train.collect_stats(layer, source.arch, x, kwargs[0], 2, device)
        block = TrainableBlock(layer, source.arch, recipe, stats, seed=0)
        report = train.train_block(block, layer, x, target, kwargs[0], recipe, device)
        return torch.tensor(report.losses), report.skipped

    (captured, skipped), (eager, _) = both(train, losses)
    assert skipped == 0 and len(captured) == SMALL["epochs"]
    if matrix == "svd":  # with other matrices the loss of a random model need not fall in so few steps
        assert captured[-1] < captured[0]
    torch.testing.assert_close(captured, eager, rtol=2e-2, atol=0)  # flipped roundings, over 16 steps


def test_end_to_end_training(tmp_path, both, monkeypatch):
    monkeypatch.setattr(endtoend, "HELD_OUT", 0)  # random rows teach nothing about each other
    device = torch.device("cuda")
    source = ModelSource(make_model(tmp_path / "model"))
    recipe = make_recipe(**SMALL)
    spec, tokens = make_spec(source, recipe), random_tokens(7, 24)
    x, kwargs = record_inputs(source, tokens, device)
    x = x_q = x.to(device)
    blocks = []
    for i in range(source.num_blocks):
        x, x_q, tensors, _ = quantize_block(source, i, recipe, spec, x, x_q, kwargs[i], device)
        blocks.append(tensors)

    def run():
        return endtoend.distill(source, blocks, tokens, recipe, spec, device)

    (captured, _, report), (eager, _, expected) = both(endtoend, run)
    assert report.kl_last_epoch < report.kl_first_epoch
    assert report.kl_last_epoch == pytest.approx(expected.kl_last_epoch, rel=0.05)
    for mine, other in zip(captured, eager, strict=True):
        assert mine.keys() == other.keys()


@pytest.mark.parametrize("shape", [(1, 224), (2, 224), (20, 32), (1, 600)], ids=str)
@pytest.mark.parametrize("kind", ["svd", "direct", "orthogonal"])
def test_matrices_of_every_size_are_captured(kind, shape):
    """224 is the wider factor of a 70B model's intermediate size."""
    found = []
    for graph in (True, False):
        torch.manual_seed(0)
        matrix = MATRICES[kind](*shape, torch.Generator().manual_seed(0)).cuda()
        data = torch.randn(6, shape[0], shape[1], shape[1], device="cuda")

        def loss(x, matrix=matrix):
            p, inverse_t = matrix()
            return (p - x).square().mean() + (inverse_t - x).square().mean()

        groups = [{"params": list(matrix.parameters()), "lr": 1e-3}]
        trainer = Steps(loss, groups, lambda _: 1.0, data.device, graph=graph)
        found.append(torch.stack([trainer.step(x) for x in data]))
        assert (trainer.graph is not None) == graph
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_attention_of_grouped_heads_keeps_no_square_of_the_tokens():
    """Fused, in float32 and not TF32; its gradients too."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    torch.manual_seed(0)
    shapes = (12, 8, 1024, 16), (12, 2, 1024, 16), (12, 2, 1024, 16)  # enough heads for the fused form
    exact = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs = [x.detach().float().cuda().requires_grad_() for x in exact]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = []
    for q, k, v in (exact, inputs):
        out, _ = attention_forward(module, q, k, v, None)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    assert torch.cuda.max_memory_allocated() - before < 12 * 8 * 1024**2 * 4
    for wide, ours in zip(*results, strict=True):
        error = (ours.cpu() - wide).abs().max() / wide.abs().max()
        assert error < 2**-14, error  # TF32 keeps 11 bits


@pytest.mark.parametrize("rows", [2, 12])  # the plain form, the fused one
@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_of_attention_are_the_same_each_time(groups, rows):
    """PyTorch's kernel divides so many tokens between programs that add up in any order, unless it must not. In a
    captured graph too."""
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    torch.manual_seed(0)
    shapes = (rows, 8, 2048, 64), (rows, 8 // groups, 2048, 64), (rows, 8 // groups, 2048, 64)
    inputs = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]

    def gradients():
        out, _ = attention_forward(module, *inputs, None)
        return torch.autograd.grad(out.square().sum(), inputs)

    first = gradients()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = gradients()
    for _ in range(10):
        graph.replay()
        for again in (gradients(), captured):
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_failed_capture_gives_its_memory_back(caplog, monkeypatch):
    """A loss that waits for the GPU cannot be captured: the steps stay eager, later ones can be captured, earlier
    captures can be replayed, and random numbers are drawn as before.

    Whose memory it is decides, not how much is unused: a tensor of the eager steps may keep a far larger segment of
    the common pool (cuBLAS's workspace one of 128 MB).
    """
    reserved, original = [], capture.capture

    def watched(*args):
        reserved.append(torch.cuda.memory_reserved())
        try:
            return original(*args)
        except capture.CaptureError:
            reserved.append(torch.cuda.memory_reserved())
            raise

    count, found = 512, []
    data = torch.randn(6, count, count, device="cuda")
    twice = capture.Repeated(lambda x: 2 * x, data.device, "doubling")
    for x in data[:2]:
        twice(x)
    assert twice.recording is not None
    monkeypatch.setattr(capture, "capture", watched)
    capture.warn_once.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()  # the pools of other tests' graphs
    others = private_segments()
    for waits in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(2**16, count, device="cuda") * count**-0.5)
        calls = []

        def loss(x, p=p, calls=calls, waits=waits):
            y = p @ x  # 128 MB
            calls.append(y.shape)
            if waits and len(calls) == 4:
                y.sum().item()
            return y.square().mean()

        trainer = Steps(loss, [{"params": [p], "lr": 1e-3}], lambda _: 1.0, p.device)
        with caplog.at_level(logging.WARNING):
            found.append(torch.stack([trainer.step(x) for x in data]))
        assert (trainer.graph is None) == waits
        assert torch.equal(twice(data[3]), 2 * data[3])
        torch.manual_seed(1)
        drawn = torch.randn(2, 8, device="cuda")
        more = torch.randn(2, 8, device="cuda")
        torch.manual_seed(1)
        assert torch.equal(torch.randn(2, 8, device="cuda"), drawn) and not torch.equal(more, drawn)
        own = {pool: some for pool, some in private_segments().items() if pool not in others}
        assert waits != bool(own), f"a graph has a pool, and what failed has none: {own}"
        if waits:
            assert "not captured" in caplog.text and "previous error" not in caplog.text
            before, after = reserved
            room = (
                2**21
            )  # the segment that the graph's random state, which is not in its pool, may be first in
            assert after <= before + room, f"{before} bytes before the capture, {after} after it"
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_later_blocks_leave_no_more_memory_behind():
    """cuBLAS keeps a workspace for each stream, so blocks share theirs."""
    kept, data = [], torch.randn(6, 64, 64, device="cuda")
    for _ in range(4):  # the first loads what stays
        p = torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
        groups = [{"params": [p], "lr": 1e-3}]
        trainer = Steps(lambda x, p=p: (x @ p).square().mean(), groups, lambda _: 1.0, data.device)
        for x in data:
            trainer.step(x)
        assert trainer.graph is not None
        del trainer, groups, p
        gc.collect()
        kept.append(torch.cuda.memory_allocated())
    assert len(set(kept[1:])) == 1, kept


def private_segments():
    """(total, allocated) bytes and stream of each segment of the allocator, by the private pool that has it."""
    pools = {}
    for s in torch.cuda.memory_snapshot():
        if (pool := tuple(s["segment_pool_id"])) != (0, 0):
            pools.setdefault(pool, []).append((s["total_size"], s["allocated_size"], s["stream"]))
    return pools
