"""How fast are the kernels against the chip, bf16 cuBLAS and vLLM's own quantized kernels?

    python benchmarks/kernels.py --print                          # everything, appended to benchmarks/results/kernels.csv
    python benchmarks/kernels.py --only llama-8b,layer --tokens 1,16
    python benchmarks/kernels.py --only 4096x14336                # one GEMM

CUDA graph replay over rotating buffers that together exceed the L2. One row per kernel, shape and number of
tokens, with the median and the spread of the replays, the SM clock after them, and the share of the floor:
the larger of bytes moved at a copy's rate and operations at the tensor cores' dense rate.
Peers are measured where vLLM is importable. Our kernels are compiled first, by --workers processes at once.

The parts of --only and the numbers of tokens are taken in the order given. For each number of tokens every shape
and every kernel is timed before the next, so that a run that was cut off leaves whole columns of the table. Rows
already there for this GPU and commit are skipped, so the next run goes on where it stopped.
"""

import argparse
import csv
import gc
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from kernel_calls import (
    At,
    Shape,
    bytes_us,
    gemm_floor,
    gemm_makers,
    has_vllm,
    head_makers,
    layer_makers,
    ours,
    transform_makers,
    transform_rotation,
)
from kernel_tables import MODELS, tables
from timing import RESULTS, Table, clocks, copies, environment, graph_us, need_gpu, summary
from tune_w4_gemm import compile_all

from vllm_flatquant.kernels.jit import hopper
from vllm_flatquant.kernels.tiles import Tile, w4_gemm_tile

TOKENS = [1, 16, 64, 2048, 8192, 256, 128, 1024, 32, 512, 4096, 17, 33, 65, 129, 2, 4, 8]
"""Most wanted first: a run that is cut off has the columns of the aims."""
LAYER, LARGE = MODELS["Llama-3-8B"], MODELS["Llama-3-70B"]
GEMMS = {"llama-8b": LAYER, "llama-70b": LARGE}
HEAD = (128256, 4096)
FACTORS = [(64, 64), (112, 128)]
SPLIT = [
    (1, 128, 200), (2, 100, 128), (1, 128, 148), (2, 74, 128), (1, 128, 224), (2, 112, 128), (1, 96, 144), (1, 108, 128),
]  # fmt: skip
"""Blocks and factors of down_proj's transform that compete: Qwen3-32B, Qwen2.5-7B, Llama-3-70B, Qwen2.5-14B."""
SHARDS = (2, 4, 8)
LAYER_SETS = 4  # of a layer's weights, 109 MB each
PARTS = ["llama-8b", "layer", "transform", "llama-70b", "head", "sharded", "split"]
COLUMNS = [
    "question", "kernel", "n", "k", "shards", "tokens", "us", "spread", "floor_us", "of_floor", "sm_mhz",
    "gpu", "torch", "triton", "vllm", "commit",
]  # fmt: skip
KEY = ["question", "kernel", "n", "k", "shards", "tokens", "gpu", "commit"]
PEER_ERRORS = (AttributeError, RuntimeError, TypeError, ValueError)
START = time.monotonic()


def say(*what: object) -> None:
    print(f"{time.monotonic() - START:6.1f} s ", *what, flush=True)


class Recorder:
    """Measures what has no row yet and appends it."""

    def __init__(self, path: Path, without: list[str]) -> None:
        self.table, self.without = Table(path, COLUMNS, KEY), without
        self.fixed = environment() | {"vllm": ""}
        if has_vllm():
            import vllm

            self.fixed["vllm"] = vllm.__version__

    def wants(self, subject: "Subject", tokens: int) -> dict | None:
        """The row to be measured; None where there is one, or none is wished for."""
        what = {name: getattr(subject, name) for name in ("question", "kernel", "n", "k", "shards")}
        row = what | {"tokens": tokens} | self.fixed
        skip = any(name and name in subject.kernel for name in self.without)
        return None if skip or self.table.has(row) else row

    def make(self, subject: "Subject") -> At | None:
        """None, and a line, where a peer refuses the shape: that is a result, not the end of the run."""
        try:
            return subject.make()
        except PEER_ERRORS as error:
            self.failed(str(subject[:5]), error)
        return None

    def measure(self, subject: "Subject", tokens: int, at: At) -> None:
        row = self.wants(subject, tokens)
        if row is None:
            return
        try:
            us, spread = summary(graph_us(at(tokens), subject.rotation(tokens)))
        except PEER_ERRORS as error:
            self.failed(f"{subject[:5]} at {tokens} tokens", error)
            return
        floor = subject.floor(tokens)
        row |= {
            "us": f"{us:.2f}",
            "spread": f"{spread:.3f}",
            "floor_us": f"{floor:.2f}",
            "of_floor": f"{floor / us:.2f}",
        }
        self.table.append(row | {"sm_mhz": clocks()})

    def failed(self, what: str, error: Exception) -> None:
        say("failed:", what, repr(error)[:200])
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # every call after it would fail too
            sys.exit(f"the GPU's context is gone after: {what}\nGo on without it: --without NAME")


def compile_transforms(job: tuple[int, int, int]) -> list:
    """Call each transform of ours once for factors a, b and t tokens, which fills the on-disk cache."""
    a, b, t = job
    for kernel, (make, _) in transform_makers(a, b, peers=False).items():
        if "kron" in kernel:
            make()(t)(0)
    torch.cuda.synchronize()
    return []


def compile_split(job: tuple[int, int, int]) -> list:
    """The same for SiLU*mul with the transform of so many blocks and factors."""
    shards, a, b = job
    make, _ = transform_makers(a, b, False, shards)["silu_mul_kron_quant"]
    for t in (1, 256, 8192):
        make()(t)(0)
    torch.cuda.synchronize()
    return []


def compile_head(tokens: int) -> list:
    head_makers(1024, HEAD[1])["w8_linear"]()(tokens)(0)
    torch.cuda.synchronize()
    return []


def compile_jobs(parts: list[str], tokens: list[int]) -> list[tuple[Callable, object]]:
    """(function, argument) for each variant that ``parts`` will run; the slowest to compile first."""
    gpu, wgmma = torch.cuda.get_device_name(), hopper(torch.device("cuda"))
    variants: dict[tuple[Tile, int, int], tuple[tuple[int, int, int], list[Tile]]] = {}
    for part in parts:
        for n, k in shapes_of(part):
            for shards in SHARDS if part == "sharded" else (1,):
                for t in tokens:
                    # The code depends on the tile and the shards, for one token on K: few rows serve.
                    tile = w4_gemm_tile(gpu, wgmma, t, n, k, shards)
                    key = tile, shards, k if tile.bm == 1 else 0
                    variants.setdefault(key, ((1024, k, shards), [tile]))
    gemms = sorted(variants.values(), key=lambda job: -job[1][0].bm * job[1][0].bn)
    jobs: list[tuple[Callable, object]] = [(compile_all, job) for job in gemms]
    if "transform" in parts or "layer" in parts:
        square, tall = FACTORS
        few = [(*square, 1), (*square, 256), (*square, 8192), (*tall, 1), (*tall, 256)]
        jobs += [(compile_transforms, job) for job in [*few, (32, 128, 1), (32, 128, 256)]]
    if "split" in parts:
        jobs += [(compile_split, job) for job in SPLIT]
    if "head" in parts:
        jobs += [(compile_head, t) for t in (16, 32, 64, 128)]
    return jobs


def finish(jobs: list[Future]) -> None:
    """Wait for all. What failed here is compiled, or fails, where it is measured."""
    for job in jobs:
        error = job.exception()
        for what, why in job.result() if error is None else [("a job", repr(error)[:200])]:
            say("does not compile:", what, why)


def shapes_of(part: str) -> list[Shape]:
    """The GEMMs of a part, (N, K)."""
    if part in ("layer", "transform", "head", "split"):
        return list(LAYER) if part == "layer" else []
    if part == "sharded":
        return [(n, k) for n, k in LAYER if n == LAYER[1][0]]
    if part in GEMMS:
        return list(GEMMS[part])
    n, _, k = part.partition("x")
    if not (n.isdigit() and k.isdigit()):
        sys.exit(f"--only {part}: neither a shape NxK nor one of {', '.join(PARTS)}")
    return [(int(n), int(k))]


class Subject(NamedTuple):
    """One kernel on one shape: how to make it, the buffers that take turns and the floor, for so many tokens."""

    question: str
    kernel: str
    n: int
    k: int
    shards: int
    make: Callable[[], At]
    rotation: Callable[[int], int]
    floor: Callable[[int], float]


def gemm(n: int, k: int, shards: int, kernel: str, make: Callable[[], At], question: str) -> Subject:
    rotation = 2 if question == "head" else copies(n * k // 2)
    return Subject(
        question, kernel, n, k, shards, make, lambda t: rotation, lambda t: gemm_floor(kernel, t, n, k)
    )


def transform(
    a: int, b: int, kernel: str, make: Callable[[], At], moved: float, shards: int = 1
) -> Subject:
    k = shards * a * b
    return Subject(
        "transform",
        kernel,
        b,
        k,
        shards,
        make,
        lambda t: transform_rotation(t, k),
        lambda t: bytes_us(moved * t),
    )


def layer(kernel: str, make: Callable[[], At]) -> Subject:
    """The floor is that of the four GEMMs, without what lies between them."""
    return Subject(
        "layer", kernel, 0, 0, 1, make, lambda t: LAYER_SETS,
        lambda t: sum(gemm_floor(kernel, t, n, k) for n, k in LAYER),
    )  # fmt: skip


def subjects(part: str) -> list[Subject]:
    """What a part times, in this order for each number of tokens."""
    if part == "layer":
        return [layer(*item) for item in layer_makers(list(LAYER), LAYER_SETS).items()]
    if part == "head":
        return [gemm(*HEAD, 1, *item, "head") for item in head_makers(*HEAD).items()]
    if part == "transform":
        return [
            transform(a, b, kernel, *how)
            for a, b in FACTORS
            for kernel, how in transform_makers(a, b, peers=True).items()
        ]
    if part == "split":
        return [
            transform(a, b, kernel, *how, shards)
            for shards, a, b in SPLIT
            for kernel, how in transform_makers(a, b, True, shards).items()
            if kernel in ("silu_mul_kron_quant", "vLLM silu_and_mul")
        ]
    if part == "sharded":
        return [
            gemm(n, k, s, f"w4_gemm S={s}", partial(ours, n, k, s), "gemm")
            for n, k in shapes_of(part)
            for s in SHARDS
        ]
    return [
        gemm(n, k, 1, *item, "gemm") for n, k in shapes_of(part) for item in gemm_makers(n, k).items()
    ]


def tokens_of(part: str, tokens: list[int]) -> list[int]:
    """Those of ``tokens`` that tell something about a part."""
    if part in ("transform", "split"):
        return [t for t in tokens if t in (1, 16, 64, 256, 2048, 8192)]
    return [t for t in tokens if t <= 256] if part == "head" else tokens


def measure(record: Recorder, part: str, tokens: list[int]) -> None:
    """Every kernel on every shape of a part is prepared once; then all of them for each number of tokens."""
    made = []
    for subject in subjects(part):
        if any(record.wants(subject, t) for t in tokens):
            at = record.make(subject)
            made += [(subject, at)] if at else []
    for t in tokens:
        for subject, at in made:
            record.measure(subject, t, at)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        help=f"of {', '.join(PARTS)}, in order; a shape NxK is a part too",
    )
    parser.add_argument(
        "--tokens", default=",".join(map(str, TOKENS)), help=f"in order [{', '.join(map(str, TOKENS))}]"
    )
    parser.add_argument("--without", default="", help="kernels to leave out, parts of their names")
    parser.add_argument("--workers", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--print", action="store_true", help="print the tables of this run at the end")
    args = parser.parse_args()
    need_gpu()
    tokens, parts = [int(t) for t in args.tokens.split(",")], args.only.split(",")
    jobs = compile_jobs(parts, tokens) if args.workers else []
    # Nothing is timed before the last worker is gone; vLLM is imported in the meantime.
    with ProcessPoolExecutor(max(1, args.workers), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(function, job) for function, job in jobs]
        record = Recorder(args.results, args.without.split(","))
        say("imported; vLLM", record.fixed["vllm"] or "is not here")
        finish(running)
    say(f"compiled {len(jobs)} variants")
    gc.freeze()  # what the imports left need not be walked again with every row
    for part in parts:
        measure(record, part, tokens_of(part, tokens))
        torch.cuda.empty_cache()
        say("measured", part)
    if args.print:
        with args.results.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["commit"] == record.fixed["commit"]]
        print(tables([r for r in rows if r["gpu"] == record.fixed["gpu"]]))


if __name__ == "__main__":
    main()
