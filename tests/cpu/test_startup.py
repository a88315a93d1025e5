"""Start-up: kernels compile in other processes, each kind of layer once, and a line says what was done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from processes import ended, soon
from vllm.config import ParallelConfig

from vllm_flatquant import _compat, linear, startup
from vllm_flatquant.kernels import ahead, jit

from .tiny_checkpoint import Recipe, write_checkpoint
from .vllm_model import load_model

triton = pytest.importorskip("triton")
compiles = pytest.mark.skipif(jit.INTERPRET, reason="the interpreter compiles nothing")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Triton cache, and a driver for a card that is not there."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "_COMPILED", {})
    driver = ahead._NoDevice(GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return tmp_path


def collect(*tokens):
    """The variants of the transform that so many tokens need."""
    from vllm_flatquant.kernels.kron import kron_triton

    left, right = torch.eye(16)[None].bfloat16(), torch.eye(16)[None].bfloat16()
    with jit.collecting(ahead.describe) as found:
        for count in tokens:
            kron_triton(torch.zeros(count, 256).bfloat16(), left, right)
    return list(found.values())


def load(variant):
    """Whether Triton finds a variant in its cache."""
    what, seen = json.loads(variant), []
    triton.knobs.compilation.listener = lambda **event: seen.append(event["cache_hit"])
    try:
        kernel = getattr(__import__(what["kernel"][0], fromlist=["_"]), what["kernel"][1])
        kernel.device_caches.clear()
        kernel.warmup(*map(ahead._decoded, what["args"]), grid=(1,), **what["meta"])
    finally:
        triton.knobs.compilation.listener = None
    return seen == [True]


@compiles
def test_workers_fill_the_cache_that_this_process_reads(cache):
    variants = collect(1, 2, 16, 100)
    assert len(set(variants)) == 1 < len(variants)  # Triton does not look at the number of tokens
    workers = ahead.Ahead()
    workers.submit(variants[:1])
    workers.submit(variants[1:])
    assert workers.wait() == ahead.Outcome(1, [])
    assert load(variants[0])
    workers.submit(variants)  # what is there starts no process
    assert workers._process is None and workers.wait() == ahead.Outcome(0, [])


@compiles
def test_fused_kernels_without_quantization_compile_ahead(cache):
    """They are variants of the quantizing ones, and Triton finds what a worker compiled."""
    from vllm_flatquant.kernels.rmsnorm_kron import rmsnorm_kron_triton
    from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant_triton
    from vllm_flatquant.kernels.silu_mul_kron import silu_mul_kron_triton

    left = right = torch.eye(16)[None].bfloat16()
    x, pair = torch.zeros(1, 256).bfloat16(), torch.zeros(1, 512).bfloat16()
    with jit.collecting(ahead.describe) as found:
        rmsnorm_kron_triton(x, x, x[0], 1e-6, left, right)
        silu_mul_kron_triton(pair, left, right)
        rmsnorm_kron_quant_triton(x, x, x[0], 1e-6, left, right, torch.ones(1), 4)
    norm, silu_mul, quantizing = found.values()
    assert json.loads(norm)["kernel"] == json.loads(quantizing)["kernel"] and norm != quantizing
    workers = ahead.Ahead()
    workers.submit([norm, silu_mul])
    assert workers.wait() == ahead.Outcome(2, [])
    assert load(norm) and load(silu_mul)


@compiles
def test_files_in_the_working_directory_are_not_imported(cache, monkeypatch, tmp_path_factory):
    """A user serves from anywhere, and the names of modules are common names."""
    folder = tmp_path_factory.mktemp("anywhere")
    for name in ("json", "torch", "vllm_flatquant"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(folder)
    workers = ahead.Ahead()
    workers.submit(collect(1))
    assert workers.wait() == ahead.Outcome(1, [])


@compiles
def test_what_a_worker_cannot_compile_is_said_and_left(cache):
    (good,) = collect(1)
    bad = json.dumps(json.loads(good) | {"kernel": ["vllm_flatquant.kernels.kron", "_gone"]})
    workers = ahead.Ahead()
    workers.submit([bad, good])
    compiled, (problem,) = workers.wait()
    assert compiled == 1 and re.match("a worker did not compile _gone: AttributeError: .*_gone", problem)
    workers.submit([bad])
    assert workers._process is not None  # it is tried again
    workers._process.kill()
    workers.wait()


def test_a_helper_that_fails_or_hangs_is_not_waited_for(cache, monkeypatch):
    def helper(code):
        def start(workers):
            return subprocess.Popen(
                [ahead.sys.executable, "-c", code],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip

        return start

    for code, limit, problem in [
        (
            "raise ImportError('no torch')",
            60,
            "process that compiles kernels failed (ImportError: no torch)",
        ),
        (
            "print('compiled', flush=True); import time; time.sleep(60)",
            1,
            "did not compile all kernels in 1 s",
        ),
    ]:
        monkeypatch.setattr(ahead, "_start", helper(code))
        workers, begin = ahead.Ahead(), time.monotonic()
        workers.submit(["a variant"])
        outcome = workers.wait(limit)
        assert problem in outcome.problems[-1] and time.monotonic() - begin < 30
    assert outcome.compiled == 1

    def nothing(workers):
        raise OSError("no more processes")

    monkeypatch.setattr(ahead, "_start", nothing)
    workers.submit(["a variant"])
    assert workers.wait().problems == [
        "kernels cannot be compiled in other processes (no more processes)"
    ]


@compiles
def test_ranks_do_not_compile_the_same_variant(cache):
    variants = collect(1)
    ranks = [ahead.Ahead(), ahead.Ahead()]
    for rank in ranks:
        rank.submit(variants)
    assert sum(rank.wait().compiled for rank in ranks) == 1


@compiles
def test_a_rank_takes_first_what_no_other_compiles(cache):
    from vllm_flatquant.kernels.kron import kron_triton

    ours = collect(1)[0]
    with jit.collecting(ahead.describe) as found:
        kron_triton(torch.zeros(1, 512).bfloat16(), *[torch.eye(n)[None].bfloat16() for n in (16, 32)])
    (other,) = found.values()
    rank = ahead.Ahead()
    with ahead._locked(ahead._mark(ours), wait=True):
        rank.submit([ours, other], ahead.MOST_WORKERS)  # so it has one worker
        assert soon(lambda: ahead._there(ahead._mark(other)))
        assert not ahead._there(ahead._mark(ours))
    assert rank.wait() == ahead.Outcome(2, [])


@pytest.mark.parametrize(
    "cores, ranks, workers", [(64, 1, 8), (64, 2, 4), (64, 3, 2), (64, 16, 1), (4, 2, 2)]
)
def test_ranks_share_the_workers_of_a_host(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert ahead.worker_count(ranks) == workers


@pytest.mark.parametrize("nodes, pipeline, ranks", [(1, 1, 4), (1, 2, 8), (2, 1, 2)])
def test_ranks_of_a_host_are_those_of_vllm(nodes, pipeline, ranks):
    parallel = ParallelConfig(
        tensor_parallel_size=4, pipeline_parallel_size=pipeline, nnodes=nodes,
        distributed_executor_backend="mp",
    )  # fmt: skip
    config = SimpleNamespace(
        parallel_config=parallel, lora_config=None, load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )  # fmt: skip
    assert _compat.deployment(config).local_ranks == ranks


HANGS = """
import os, subprocess, time
from pathlib import Path

class kernel:
    @staticmethod
    def warmup(*args, **meta):
        compiler = subprocess.Popen(["sleep", "600"])
        Path(__file__).with_name("pids").write_text(f"{os.getppid()} {os.getpid()} {compiler.pid} .")
        compiler.wait()
"""
ASKS = """
import sys, time
from vllm_flatquant.kernels import ahead
ahead.Ahead().submit([sys.argv[1]])
time.sleep(600)
"""


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A variant whose compiler hangs, and what gives (helper, worker, compiler), their process ids, when it does."""
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    known = tmp_path / "pids"

    def pids():
        assert soon(lambda: known.exists() and known.read_text().endswith("."))
        return [int(pid) for pid in known.read_text().split()[:-1]]

    variant = {"kernel": ["hangs", "kernel"], "args": [], "meta": {}, "target": ["cuda", 90, 32]}
    yield json.dumps(variant), pids
    for pid in pids():
        if not ended(pid):
            os.kill(pid, signal.SIGKILL)


@compiles
def test_nothing_outlives_an_engine_that_is_killed(cache, hanging):
    variant, pids = hanging
    engine = subprocess.Popen([sys.executable, "-c", ASKS, variant])
    try:
        group = pids()
        assert not any(map(ended, group))
    finally:
        engine.kill()
        engine.wait()
    assert soon(lambda: all(map(ended, group)), 10)


@compiles
def test_a_helper_that_is_killed_is_said_once_and_leaves_no_worker(cache, hanging):
    variant, pids = hanging
    workers = ahead.Ahead()
    workers.submit([variant])
    helper, worker, compiler = pids()
    os.kill(helper, signal.SIGKILL)
    assert soon(lambda: ended(helper) and ended(worker), 10)
    for more in "abc":
        workers.submit([more])
    assert workers.wait(20).problems == ["the process that compiles kernels failed (status -9)"]
    assert soon(lambda: ended(compiler), 10)


class Owner:
    def __init__(self, kind):
        self.name, self.ran = kind, []

    def kind(self, layer):
        return self.name

    def stand_in(self, layer):
        return "stand-in"

    def run_kernels(self, layer):
        self.ran.append(layer if layer == "stand-in" else "layer")
        if self.name == "a":
            for block in (16, 32):
                jit.launch(Kernel, (1,), torch.zeros(16), BLOCK=block)


class Kernel:
    arg_names = ("x", "BLOCK")

    def __class_getitem__(cls, grid):
        return lambda *args, **meta: {(*grid, 1, 1): lambda *again: None}


@pytest.fixture
def start(monkeypatch):
    """A StartUp whose layers are on a GPU, what it submits to workers, and what it logs."""
    monkeypatch.setattr(jit, "_COMPILED", {})
    monkeypatch.setattr(jit, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(startup, "_device", lambda layer: "cuda:0")
    monkeypatch.setattr(ahead, "describe", lambda kernel, args, meta: meta["BLOCK"])
    submitted, lines = [], []
    outcomes = [ahead.Outcome(1, ["a worker did not compile it"])]
    workers = SimpleNamespace(
        submit=lambda *found: submitted.append(found),
        wait=lambda: outcomes.pop() if outcomes else ahead.Outcome(0, []),
    )
    monkeypatch.setattr(ahead, "Ahead", lambda: workers)
    for level in ("info", "warning"):
        monkeypatch.setattr(_compat.logger, level, lambda text, *rest: lines.append(text % rest))
    return startup.StartUp(), submitted, lines


def test_each_kind_is_announced_early_and_run_once(start):
    begun, submitted, lines = start
    owners = [Owner(kind) for kind in ("a", "a", None, "b")]
    for owner in owners:
        begun.created(owner, object(), ranks=2)
    assert submitted == [([16, 32], 2)] and owners[0].ran == ["stand-in"] and jit.variants() == 0
    for owner in owners:
        assert not [line for line in lines if "ready" in line]
        with begun.weights():
            pass
        begun.processed(owner, object())
    assert submitted == [([16, 32], 2), ([], 2)]  # the last layer's, which nothing was created after
    assert [owner.ran for owner in owners] == [["stand-in", "layer"], [], [], ["stand-in", "layer"]]
    kernels, weights = lines[-2:]
    assert re.fullmatch(r"FlatQuant: 2 kernels ready in \d+\.\d\d s \(1 from cache\)", kernels)
    assert re.fullmatch(r"FlatQuant: weights of 4 layers ready in \d+\.\d\d s", weights)
    warning = "FlatQuant: a worker did not compile it; it is compiled where it is needed"
    assert lines[0] == warning


def test_what_this_process_had_to_compile_is_said(start):
    begun, _, lines = start
    owner = Owner("a")
    begun.created(owner, object())
    begun._seen(False)
    begun._seen(True)
    begun.processed(owner, object())
    assert lines[-2].endswith("s (0 from cache, 1 compiled by this process)")


@pytest.mark.parametrize("kind", [None, "b"])
def test_no_layer_is_kept(start, kind):
    begun = start[0]
    for _ in range(2):  # the second time its kernels have run
        layer = torch.nn.Linear(1, 1)
        known = weakref.ref(layer)
        begun.created(Owner(kind), layer)
        begun.processed(Owner(kind), layer)
        del layer
        assert known() is None


def test_nothing_is_announced_without_a_gpu(start, monkeypatch):
    begun, submitted, _ = start
    monkeypatch.setattr(startup, "_device", lambda layer: "cpu")
    begun.created(Owner("a"), object())
    begun.created(Owner("b"), object())
    assert not submitted


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_goes_through_the_kernels_of_each_kind_twice(tmp_path, monkeypatch, backend):
    from vllm_flatquant import config
    from vllm_flatquant.choice import Choice

    begun, calls = startup.StartUp(), []
    monkeypatch.setattr(linear, "startup", begun)
    monkeypatch.setattr(config, "choose_backend", lambda _: Choice(backend, "test"))
    original = linear.FlatQuantLinearMethod.run_kernels
    monkeypatch.setattr(
        linear.FlatQuantLinearMethod,
        "run_kernels",
        lambda self, layer: calls.append(self._site.name) or original(self, layer),
    )
    # As on a GPU, where kernels are gone through before the weights are there, too.
    monkeypatch.setattr(startup, "_device", lambda layer: "cuda:0")
    recipe = Recipe(shards=2, dtype=torch.bfloat16)
    write_checkpoint(tmp_path, recipe)
    model = load_model(tmp_path)
    kinds = ["qkv", "o", "gate_up", "down"] if backend == "triton" else []
    assert sorted(calls) == sorted(2 * kinds) and calls[: len(kinds)] == kinds
    assert len(model.model.layers) > 1 and begun._open == 0


@pytest.mark.parametrize("rank, site, used", [(0, "o", True), (1, "o", False), (1, "qkv", True)])
def test_kernels_run_with_the_bias_that_serving_has(rank, site, used):
    bias = object()
    layer = SimpleNamespace(bias=bias, skip_bias_add=False, tp_rank=rank)
    method = SimpleNamespace(_site=SimpleNamespace(row_parallel=site == "o"))
    assert (linear.FlatQuantLinearMethod._bias(method, layer) is bias) == used
    layer.skip_bias_add = True
    assert linear.FlatQuantLinearMethod._bias(method, layer) is None


def test_more_tokens_are_another_kind():
    """Of two engines in one process the second may serve more of them, which need other variants."""

    def kind(*tokens):
        bits = SimpleNamespace(bits=4)
        method = SimpleNamespace(
            _runtime=SimpleNamespace(tokens=tokens), _shape=(8, 8), _dtype=torch.bfloat16, _fusion=None,
            _spec=SimpleNamespace(weights=bits, activations=bits), _bias=lambda layer: None,
        )  # fmt: skip
        layer = torch.nn.Linear(8, 8)
        layer.transform_left = layer.transform_right = layer.transform_clip = None
        return linear.FlatQuantLinearMethod.kind(method, layer)

    assert kind(1, 512) == kind(1, 512) != kind(1, 512, 8192)


def test_listener_leaves_that_of_others_in_place(monkeypatch):
    seen, others = [], []
    knobs = SimpleNamespace(compilation=SimpleNamespace(listener=lambda **event: others.append(event)))
    monkeypatch.setattr(jit, "triton", SimpleNamespace(knobs=knobs))
    before = knobs.compilation.listener
    with startup._listening(seen.append):
        knobs.compilation.listener(cache_hit=True, src=1)
    assert seen == [True] and others == [{"cache_hit": True, "src": 1}]
    assert knobs.compilation.listener is before
