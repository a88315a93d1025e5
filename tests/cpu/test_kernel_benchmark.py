"""benchmarks/kernels.py on the CPU, with small shapes and a made-up timer; its tables from made-up rows."""

import csv
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from test_recipes import script

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((512, 256), (256, 256), (1024, 256), (256, 512))
TOKENS = [1, 16, 3]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The script, where each call runs once, through the CPU's references, and takes a microsecond."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernel_calls

    kernels = script(ROOT / "benchmarks" / "kernels.py")

    def timed(call, rotation):
        call(0), call(rotation - 1)
        return [1.0] * 3

    card = {"gpu": "a card", "torch": "2", "triton": "3", "commit": "abc"}
    monkeypatch.setattr(kernel_calls, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {
        "graph_us": timed, "clocks": lambda: "1000", "environment": lambda: dict(card), "LAYER": SHAPES,
        "GEMMS": {"llama-8b": SHAPES}, "HEAD": (512, 256), "FACTORS": [(16, 16)], "SHARDS": (2,),
        "LAYER_SETS": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernel_calls, "copies", lambda size, limit=2: 2)
    monkeypatch.setattr(kernels, "copies", lambda size: 2)

    def run(*arguments):
        results = tmp_path / "rows.csv"
        monkeypatch.setattr(
            sys, "argv", ["kernels.py", f"--results={results}", "--workers=0", *arguments]
        )
        kernels.main()
        with results.open(newline="") as file:
            return list(csv.DictReader(file))

    run.kernels, run.calls = kernels, kernel_calls
    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["kernels", "host_time", "tune_w4_gemm"])
def test_without_a_gpu_a_sentence_says_so(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="^no CUDA GPU"):
        script(ROOT / "benchmarks" / f"{name}.py").main()


def small_layer(calls, monkeypatch):
    """The factors of a layer are those of Llama-3-8B: others for the small one."""
    real = calls.factors
    sizes = {(64, 64): (16, 16), (112, 128): (16, 32), (32, 16): (16, 16)}
    monkeypatch.setattr(
        calls, "factors", lambda a, b, *shards: real(*sizes.get((a, b), (a, b)), *shards)
    )


def test_every_part_runs_and_is_not_run_again(bench, monkeypatch, capsys):
    small_layer(bench.calls, monkeypatch)
    monkeypatch.setattr(bench.calls, "vllm_makers", lambda n, k, count: {})
    monkeypatch.setattr(bench.calls, "has_vllm", lambda: False)
    monkeypatch.setattr(bench.kernels, "SPLIT", [(1, 16, 48), (2, 16, 24)])
    every = "llama-8b,layer,transform,head,sharded,split,1024x256"
    rows = bench(f"--only={every}", "--tokens=1,16,3", "--print")
    count = {q: sum(r["question"] == q for r in rows) for q in ("gemm", "layer", "transform", "head")}
    # Two kernels on four shapes and one of ours on two; three, eight and two kernels; transforms at powers of two,
    # and one of them in two ways.
    assert count == {"gemm": 3 * (2 * 4 + 2), "layer": 3 * 3, "transform": 2 * (8 + 2), "head": 3 * 2}
    assert all(float(r["us"]) == 1.0 and float(r["floor_us"]) >= 0 for r in rows)
    printed = capsys.readouterr().out
    assert "| bf16 cuBLAS, us |" not in printed  # no model of the tables' was measured
    assert "| kron_quant (/ clone) | 1.0 (1.00) | 1.0 (1.00) |" in printed and "w8_linear" in printed
    monkeypatch.setattr(bench.kernels, "graph_us", lambda *_: pytest.fail("timed a row that is there"))
    assert bench(f"--only={every}", "--tokens=1,16,3") == rows


def fake_peers(bench, monkeypatch, **makers):
    monkeypatch.setattr(bench.calls, "vllm_makers", lambda n, k, count: makers)


def test_a_column_is_complete_before_the_next(bench, monkeypatch):
    fake_peers(bench, monkeypatch, peer=lambda: lambda t: lambda i: None)
    left = [2 * 3 * 4 + 5]  # two columns and a piece

    def cut_off(call, rotation):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return [2.0]

    monkeypatch.setattr(bench.kernels, "graph_us", cut_off)
    with pytest.raises(KeyboardInterrupt):
        bench("--only=llama-8b", "--tokens=1,16,3")
    monkeypatch.setattr(bench.kernels, "graph_us", lambda call, rotation: [2.0])
    rows = bench("--only=llama-8b", "--tokens=1,16,3")
    order = [(int(r["tokens"]), int(r["n"]), int(r["k"]), r["kernel"]) for r in rows]
    kernels = ("bf16 cuBLAS", "w4_gemm", "peer")
    assert order == [(t, *shape, kernel) for t in TOKENS for shape in SHAPES for kernel in kernels]


def test_a_refusing_peer_costs_its_own_rows(bench, monkeypatch, capsys):
    def refuses():
        raise RuntimeError("not this shape")

    def refuses_some(t):
        return lambda i: refuses() if t == 16 else None

    fake_peers(bench, monkeypatch, never=refuses, some=lambda: refuses_some, other=lambda: refuses_some)
    rows = bench("--only=1024x256", "--tokens=1,16", "--without=other,")
    assert [(r["kernel"], r["tokens"]) for r in rows] == [
        ("bf16 cuBLAS", "1"), ("w4_gemm", "1"), ("some", "1"), ("bf16 cuBLAS", "16"), ("w4_gemm", "16"),
    ]  # fmt: skip
    assert capsys.readouterr().out.count("failed: ('gemm'") == 2


def test_a_dead_gpu_ends_the_run_and_names_the_kernel(bench, monkeypatch):
    def dies():
        monkeypatch.setattr(torch.cuda, "synchronize", dies)
        raise RuntimeError("illegal memory access")

    fake_peers(bench, monkeypatch, killer=lambda: lambda t: lambda i: dies())
    with pytest.raises(SystemExit, match="killer.* at 1 tokens\nGo on without it"):
        bench("--only=1024x256", "--tokens=1,16")


def test_what_is_no_part_is_named(bench):
    with pytest.raises(SystemExit, match="--only gemm: neither a shape NxK nor one of llama-8b"):
        bench("--only=gemm")


def test_every_variant_is_compiled_first(bench, monkeypatch):
    """On an H100: whatever tile a part runs with has a job, and each job is one variant."""
    from vllm_flatquant.kernels.tiles import w4_gemm_tile

    h100, kernels = "NVIDIA H100 80GB HBM3", bench.kernels
    models = kernels.MODELS
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: h100)
    monkeypatch.setattr(kernels, "hopper", lambda device: True)
    monkeypatch.setattr(kernels, "FACTORS", [(64, 64), (112, 128)])
    monkeypatch.setattr(kernels, "LAYER", models["Llama-3-8B"])
    monkeypatch.setattr(
        kernels, "GEMMS", {"llama-8b": models["Llama-3-8B"], "llama-70b": models["Llama-3-70B"]}
    )
    jobs = kernels.compile_jobs(kernels.PARTS[:-2], kernels.TOKENS)
    gemms = [arguments for function, arguments in jobs if function is kernels.compile_all]
    assert len(gemms) < 30 and len(jobs) == len(gemms) + 7 + 4  # and the transforms' and the head's
    for shapes in models.values():
        for n, k in shapes:
            for t in kernels.TOKENS:
                tile = w4_gemm_tile(h100, True, t, n, k, 1)
                assert sum(found == [tile] for _, found in gemms) == 1
    assert all(tile.fits(*shape) for shape, (tile,) in gemms)


def test_a_variant_that_does_not_compile_is_named(bench, capsys):
    jobs = [Future() for _ in range(3)]
    jobs[0].set_exception(RuntimeError("out of registers"))
    jobs[1].set_result([("a tile", "why")])
    jobs[2].set_result([])
    bench.kernels.finish(jobs)
    said = capsys.readouterr().out
    assert "a job RuntimeError('out of registers')" in said and "a tile why" in said
    assert said.count("does not compile") == 2


def made_up(kernel, us, tokens, shapes, question="gemm", gpu="H100", commit="new"):
    return [
        {"question": question, "kernel": kernel, "n": str(n), "k": str(k), "tokens": str(t), "us": str(us * t),
         "gpu": gpu, "commit": commit}
        for n, k in shapes for t in tokens
    ]  # fmt: skip


def test_tables(bench):
    from kernel_tables import MODELS, tables

    small, large = MODELS.values()
    whole = "w4_gemm with norm, SiLU*mul and transforms"
    rows = [
        *made_up("bf16 cuBLAS", 8, [1, 2, 16], small, commit="old"),
        *made_up("w4_gemm", 1, [1, 2, 16], small, commit="old"),
        *made_up("bf16 cuBLAS", 12, [1, 2, 16], small),
        *made_up("w4_gemm", 4, [1, 2, 16], small),
        *made_up("vLLM fast", 5, [1, 2], small),
        *made_up("vLLM fast", 3, [16], small),
        *made_up("w4_gemm", 1, [1], small, commit="later"),  # less was measured: not this one
        *made_up("bf16 cuBLAS", 30, [1, 2], [(0, 0)], "layer"),
        *made_up(whole, 15, [1], [(0, 0)], "layer"),
        *made_up("bf16 cuBLAS with vLLM's norm and SiLU*mul", 45, [1], [(0, 0)], "layer"),
        *made_up("bf16 cuBLAS", 12, [1], large),
        *made_up("w4_gemm", 4, [1], large),
        *made_up("vLLM fast", 3, [1], large[:2]),
        *made_up("clone", 2, [1, 16], [(64, 4096)], "transform"),
        *made_up("kron_quant", 3, [1, 16], [(64, 4096)], "transform"),
        *made_up("bf16 cuBLAS", 6, [1], small, gpu="H200"),
        *made_up("w4_gemm", 4, [1], small, gpu="H200"),
    ]
    text = tables(rows)
    assert text.splitlines()[:7] == [
        "| Llama-3-8B, H100, commit new | 1 | 2 | 16 |",
        "|---|---|---|---|",
        "| bf16 cuBLAS, us | 48 | 96 | 768 |",
        "| w4_gemm | **3.00** | **3.00** | 3.00 |",
        "| with norm, SiLU*mul and transforms (bf16: without) | 2.00 |  |  |",
        "| with norm, SiLU*mul and transforms (bf16: with vLLM's) | 3.00 |  |  |",
        "| vLLM fast | 2.40 | 2.40 | **4.00** |",
    ]
    assert "Behind a peer: 6144x4096 at 16 tokens (64.0 us, vLLM fast 48.0); 4096x4096 at 16" in text
    assert "| Llama-3-70B, H100, commit new | 1 |" in text
    assert "| Llama-3-70B, H100, commit new (10240x8192, 8192x8192) | 1 |" in text
    assert "| width 4096, R 64x64, us, H100, commit new | 1 | 16 |" in text
    assert "| kron_quant (/ clone) | 3.0 (1.50) | 48.0 (1.50) |" in text
    assert "| Llama-3-8B, H200, commit new | 1 |" in text and "| w4_gemm | **1.50** |" in text
    assert "Llama-3-70B, H200" not in text
