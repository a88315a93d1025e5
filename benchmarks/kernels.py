"""How fast are the kernels against the chip, bf16 cuBLAS and vLLM's own quantized kernels?

    python benchmarks/kernels.py                       # everything, appended to benchmarks/results/kernels.csv
    python benchmarks/kernels.py --only layer --print  # the README's table

CUDA graph replay over rotating buffers that together exceed the L2. One row per kernel, shape and number of
tokens, with the median and the spread of the replays, the SM clock after them, and the share of the floor:
the larger of bytes moved over 3.0 TB/s (a measured copy) and operations over the tensor cores' dense rate.
Peers are measured where vLLM is importable. Rows already there for this GPU and commit are skipped, so a run
that was cut off goes on where it stopped. Our kernels are compiled first, by --workers processes at once.
"""

import argparse
import csv
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from timing import RESULTS, Table, clocks, copies, environment, graph_us, summary
from tune_w4_gemm import compile_all

from vllm_flatquant.kernels.jit import hopper
from vllm_flatquant.kernels.kron import empty_codes
from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.rmsnorm_kron_quant import rmsnorm_kron_quant
from vllm_flatquant.kernels.silu_mul_kron_quant import silu_mul_kron_quant
from vllm_flatquant.kernels.tiles import Tile, w4_gemm_tile
from vllm_flatquant.kernels.w4_gemm import w4_gemm
from vllm_flatquant.kernels.w8_linear import w8_linear

TOKENS = [1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 2048, 4096, 8192]
GEMMS = {
    "llama-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}
COLUMNS = [
    "question", "kernel", "n", "k", "shards", "tokens", "us", "spread", "floor_us", "of_floor", "sm_mhz",
    "gpu", "torch", "triton", "vllm", "commit",
]  # fmt: skip
KEY = ["question", "kernel", "n", "k", "shards", "tokens", "gpu", "commit"]
PEER_ERRORS = (AttributeError, RuntimeError, TypeError, ValueError)
BYTES_PER_US = 3.0e6
INT8_PER_US, BF16_PER_US = 1979e6, 989e6
BF16 = torch.bfloat16

Call = Callable[[int], object]


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")


def gemm_calls(n: int, k: int, count: int) -> dict[str, Callable[[int], Call]]:
    """For each kernel a function from the number of tokens to a call on rotating weights."""

    def cublas() -> Callable[[int], Call]:
        weights = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(max(2, count // 3))]

        def at(t: int) -> Call:
            x = torch.randn(t, k, device="cuda", dtype=BF16)
            return lambda i: torch.mm(x, weights[i % len(weights)].t())

        return at

    def ours(shards: int) -> Callable[[int], Call]:
        weights = [
            torch.randint(0, 256, (k // 128, n, 64), dtype=torch.uint8, device="cuda")
            for _ in range(count)
        ]
        weight_scale = torch.rand(n, 1, device="cuda")

        def at(t: int) -> Call:
            x = empty_codes(t, k, torch.device("cuda")).copy_(random_codes(t, k))
            scale = torch.rand(t, shards, device="cuda")
            return lambda i: w4_gemm(x, scale, weights[i], weight_scale, None, BF16)

        return at

    calls = {"bf16 cuBLAS": cublas, "w4_gemm": lambda: ours(1)}
    if n == 4096:
        calls |= {f"w4_gemm S={s}": lambda s=s: ours(s) for s in (2, 4, 8)}
    return calls | vllm_calls(n, k, count)


def vllm_calls(n: int, k: int, count: int) -> dict[str, Callable[[], Callable[[int], Call]]]:
    """vLLM's kernels on random weights of the right layout (their speed does not depend on the values)."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
        from vllm.scalar_type import scalar_types
    except ImportError:
        return {}
    kind = scalar_types.uint4b8

    def packed(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, device="cuda")

    def cutlass(dtype: torch.dtype) -> Callable[[int], Call]:
        weights = [random_codes(n, k).to(dtype).t() for _ in range(max(2, count // 2))]
        w_scale = torch.rand(n, 1, device="cuda")

        def at(t: int) -> Call:
            x, scale = random_codes(t, k).to(dtype), torch.rand(t, 1, device="cuda")
            return lambda i: ops.cutlass_scaled_mm(x, weights[i % len(weights)], scale, w_scale, BF16)

        return at

    def machete() -> Callable[[int], Call]:
        weights = [
            ops.machete_prepack_B(packed(k // 8, n).t().contiguous().t(), BF16, kind, BF16)
            for _ in range(count)
        ]
        scales = torch.rand(k // 128, n, device="cuda").to(BF16)

        def at(t: int) -> Call:
            x = torch.randn(t, k, device="cuda", dtype=BF16)
            return lambda i: ops.machete_mm(
                a=x, b_q=weights[i], b_type=kind, b_group_scales=scales, b_group_size=128
            )

        return at

    def marlin() -> Callable[[int], Call]:
        weights = [packed(k // 16, n * 2) for _ in range(count)]
        scales = torch.rand(k // 128, n, device="cuda").to(BF16)
        workspace = marlin_make_workspace_new(torch.device("cuda"))

        def at(t: int) -> Call:
            x = torch.randn(t, k, device="cuda", dtype=BF16)
            return lambda i: ops.marlin_gemm(
                a=x, c=None, b_q_weight=weights[i], b_bias=None, b_scales=scales, a_scales=None,
                global_scale=None, b_zeros=None, g_idx=None, perm=None, workspace=workspace, b_q_type=kind,
                size_m=t, size_n=n, size_k=k, use_fp32_reduce=True,
            )  # fmt: skip

        return at

    def w4a8() -> Callable[[int], Call]:
        weights = [
            ops.cutlass_encode_and_reorder_int4b(packed(k // 8, n).t().contiguous().t())
            for _ in range(count)
        ]
        scales = ops.cutlass_pack_scale_fp8(
            torch.rand(k // 128, n, device="cuda").to(torch.float8_e4m3fn)
        )
        w_scale = torch.rand(n, 1, device="cuda")

        def at(t: int) -> Call:
            x = random_codes(t, k).to(torch.float8_e4m3fn)
            scale = torch.rand(t, 1, device="cuda")
            return lambda i: ops.cutlass_w4a8_mm(x, weights[i], scales, 128, w_scale, scale)

        return at

    return {
        "vLLM cutlass int8": lambda: cutlass(torch.int8),
        "vLLM cutlass fp8": lambda: cutlass(torch.float8_e4m3fn),
        "vLLM Machete W4A16": machete,
        "vLLM Marlin W4A16": marlin,
        "vLLM cutlass W4A8-fp8": w4a8,
    }


def gemm_floor(kernel: str, t: int, n: int, k: int) -> float:
    """Microseconds below which no kernel of this kind can be."""
    weight = {"bf16": 2.0, "w4_g": 0.5, "w8_l": 1.0}.get(
        kernel[:4], 1.0 if "int8" in kernel or kernel.endswith(" fp8") else 0.5
    )
    act = 2.0 if "bf16" in kernel or "A16" in kernel or "w8_l" in kernel else 1.0
    rate = BF16_PER_US if act == 2.0 else INT8_PER_US
    return max((n * k * weight + t * k * act + t * n * 2) / BYTES_PER_US, 2 * t * n * k / rate)


def factors(a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(1, size, size, device="cuda").div(size**0.5).to(BF16) for size in (a, b))


def transform_calls(a: int, b: int, t: int, count: int) -> dict[str, tuple[Call, float]]:
    """Each transform and what it is compared with: a call, and the bytes it must move."""
    k = a * b
    left, right = factors(a, b)
    clip, norm = torch.ones(1, device="cuda"), torch.ones(k, device="cuda", dtype=BF16)
    xs, rs = ([torch.randn(t, k, device="cuda", dtype=BF16) for _ in range(count)] for _ in range(2))
    gates = [torch.randn(t, 2 * k, device="cuda", dtype=BF16) for _ in range(count)]
    out = torch.empty(t, k, device="cuda", dtype=BF16)
    calls: dict[str, tuple[Call, float]] = {
        "clone": (lambda i: xs[i].clone(), 4.0 * t * k),
        "kron_quant": (lambda i: kron_quant(xs[i], left, right, clip, 4), 3.0 * t * k),
        "kron_quant head": (lambda i: kron_quant(xs[i], left, None, clip, 4), 3.0 * t * k),
        "rmsnorm_kron_quant": (
            lambda i: rmsnorm_kron_quant(xs[i], rs[i], norm, 1e-5, left, right, clip, 4), 7.0 * t * k,
        ),
        "silu_mul_kron_quant": (lambda i: silu_mul_kron_quant(gates[i], left, right, clip, 4), 5.0 * t * k),
    }  # fmt: skip
    try:
        import vllm._custom_ops  # noqa: F401

        calls["vLLM fused_add_rms_norm"] = (
            lambda i: torch.ops._C.fused_add_rms_norm(xs[i], rs[i], norm, 1e-5), 8.0 * t * k,
        )  # fmt: skip
        calls["vLLM silu_and_mul"] = (lambda i: torch.ops._C.silu_and_mul(out, gates[i]), 6.0 * t * k)
    except ImportError:
        pass
    return calls


def layer_calls(t: int, count: int) -> dict[str, Call]:
    """The four linears of a Llama-3-8B layer one after the other: bf16, ours, and ours with its transforms."""
    shapes = GEMMS["llama-8b"]
    bf16 = [[torch.randn(n, k, device="cuda", dtype=BF16) for n, k in shapes] for _ in range(2)]
    packed = [
        [torch.randint(0, 256, (k // 128, n, 64), dtype=torch.uint8, device="cuda") for n, k in shapes]
        for _ in range(count)
    ]
    scales = [torch.rand(n, 1, device="cuda") for n, _ in shapes]
    x = {k: torch.randn(t, k, device="cuda", dtype=BF16) for k in (4096, 14336)}
    gate_up = torch.randn(t, 28672, device="cuda", dtype=BF16)
    codes = {k: empty_codes(t, k, torch.device("cuda")).copy_(random_codes(t, k)) for k in (4096, 14336)}
    one, norm = torch.ones(1, device="cuda"), torch.ones(4096, device="cuda", dtype=BF16)
    hidden, wide, (head, _) = factors(64, 64), factors(112, 128), factors(32, 16)
    token_scale = torch.rand(t, 1, device="cuda")

    def plain(i: int) -> None:
        for weight, (_, k) in zip(bf16[i % 2], shapes, strict=True):
            torch.mm(x[k], weight.t())

    def gemms(i: int) -> None:
        for weight, scale, (_, k) in zip(packed[i], scales, shapes, strict=True):
            w4_gemm(codes[k], token_scale, weight, scale, None, BF16)

    def everything(i: int) -> None:
        qkv, o, up, down = packed[i]
        normed = rmsnorm_kron_quant(x[4096], x[4096], norm, 1e-5, *hidden, one, 4)
        w4_gemm(*normed[:2], qkv, scales[0], None, BF16)
        w4_gemm(*kron_quant(x[4096], head, None, one, 4), o, scales[1], None, BF16)
        normed = rmsnorm_kron_quant(x[4096], x[4096], norm, 1e-5, *hidden, one, 4)
        w4_gemm(*normed[:2], up, scales[2], None, BF16)
        w4_gemm(*silu_mul_kron_quant(gate_up, *wide, one, 4), down, scales[3], None, BF16)

    return {
        "bf16 cuBLAS": plain,
        "w4_gemm": gemms,
        "w4_gemm with norm, SiLU*mul and transforms": everything,
    }


class Recorder:
    """Measures what has no row yet and appends it."""

    def __init__(self, path: Path) -> None:
        self.table = Table(path, COLUMNS, KEY)
        self.fixed = environment()
        try:
            from vllm import __version__ as version
        except ImportError:
            version = ""
        self.fixed["vllm"] = version

    def wants(self, question: str, kernel: str, n: int, k: int, shards: int, tokens: int) -> dict | None:
        row = dict(
            question=question, kernel=kernel, n=n, k=k, shards=shards, tokens=tokens, **self.fixed
        )
        return None if self.table.has(row) else row

    def measure(self, row: dict | None, call: Call, rotation: int, floor: float) -> None:
        if row is None:
            return
        try:
            us, spread = summary(graph_us(call, rotation))
        except PEER_ERRORS as error:  # a peer that refuses a shape is a result, not the end of the run
            print(
                "failed:",
                row["kernel"],
                row["n"],
                row["k"],
                row["tokens"],
                repr(error)[:200],
                flush=True,
            )
            return
        row |= {
            "us": f"{us:.2f}",
            "spread": f"{spread:.3f}",
            "floor_us": f"{floor:.2f}",
            "of_floor": f"{floor / us:.2f}",
        }
        self.table.append(row | {"sm_mhz": clocks()})


def compile_transforms(job: tuple[int, int, int]) -> None:
    """Call each transform of ours once for factors a, b and t tokens, which fills the on-disk cache."""
    a, b, t = job
    for kernel, (call, _) in transform_calls(a, b, t, 1).items():
        if "kron" in kernel:
            call(0)
    torch.cuda.synchronize()


def compile_first(only: str, shapes: list[tuple[int, int]], tokens: list[int], workers: int) -> None:
    """Compile what the questions ``only`` will run, in ``workers`` processes; 0 leaves it to the first call."""
    if not workers:
        return
    gpu, wgmma = torch.cuda.get_device_name(), hopper(torch.device("cuda"))
    if "layer" in only:
        shapes = shapes + GEMMS["llama-8b"]
    jobs: dict[tuple[Tile, int], tuple[tuple[int, int, int], list[Tile]]] = {}
    if "gemm" in only or "layer" in only:
        for n, k in shapes:
            for shards in (1, 2, 4, 8) if n == 4096 else (1,):
                for (
                    t
                ) in tokens:  # the code depends on the tile and the shards, so few rows of weights serve
                    tile = w4_gemm_tile(gpu, wgmma, t, n, k, shards)
                    jobs.setdefault((tile, shards), ((1024, k, shards), [tile]))
    transforms = [(64, 64, 1), (64, 64, 256), (64, 64, 8192), (112, 128, 1), (112, 128, 256)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        if "transform" in only or "layer" in only:
            others = pool.map(compile_transforms, transforms)
        else:
            others = iter(())
        for failed in pool.map(compile_all, jobs.values()):
            for tile, why in failed:
                print("does not compile:", tile, why, flush=True)
        list(others)


def measure_gemms(record: Recorder, shapes: list[tuple[int, int]], tokens: list[int]) -> None:
    for n, k in shapes:
        count = copies(n * k // 2)
        for kernel, make in gemm_calls(n, k, count).items():
            shards = int(kernel.split("=")[1]) if "=" in kernel else 1
            wanted = [t for t in tokens if record.wants("gemm", kernel, n, k, shards, t)]
            if not wanted:
                continue
            try:
                at = make()
            except PEER_ERRORS as error:
                print("failed:", kernel, n, k, repr(error)[:200], flush=True)
                continue
            for t in wanted:
                row = record.wants("gemm", kernel, n, k, shards, t)
                record.measure(row, at(t), count, gemm_floor(kernel, t, n, k))
            del at


def measure_transforms(record: Recorder, tokens: list[int]) -> None:
    for a, b in [(64, 64), (112, 128)]:
        for t in tokens:
            count = copies(t * a * b * 2, limit=32)
            for kernel, (call, moved) in transform_calls(a, b, t, count).items():
                row = record.wants("transform", kernel, b, a * b, 1, t)
                record.measure(row, call, count, moved / BYTES_PER_US)


def measure_layer(record: Recorder, tokens: list[int]) -> None:
    for t in tokens:
        for kernel, call in layer_calls(t, 4).items():
            floor = sum(gemm_floor(kernel, t, n, k) for n, k in GEMMS["llama-8b"])
            record.measure(record.wants("layer", kernel, 0, 0, 1, t), call, 4, floor)


def measure_head(record: Recorder, tokens: list[int]) -> None:
    """The output head of a Llama-3-8B, in bf16 and in 8 bits."""
    n, k = 128256, 4096
    wide = [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(2)]
    codes = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(2)]
    scale = torch.rand(n, 1, device="cuda")
    for t in tokens:
        x = torch.randn(t, k, device="cuda", dtype=BF16)
        calls: dict[str, Call] = {
            "bf16 cuBLAS": lambda i, x=x: torch.mm(x, wide[i % 2].t()),
            "w8_linear": lambda i, x=x: w8_linear(x, codes[i % 2], scale),
        }
        for kernel, call in calls.items():
            row = record.wants("head", kernel, n, k, 1, t)
            record.measure(row, call, 2, gemm_floor(kernel, t, n, k))


def show(path: Path, gpu: str, commit: str) -> None:
    """The layer table of one GPU and commit, as Markdown."""
    with path.open() as file:
        rows = [
            r
            for r in csv.DictReader(file)
            if r["question"] == "layer" and (r["gpu"], r["commit"]) == (gpu, commit)
        ]
    tokens = sorted({int(r["tokens"]) for r in rows})
    base = {int(r["tokens"]): float(r["us"]) for r in rows if r["kernel"].startswith("bf16")}
    print("| us (speed-up) |", " | ".join(f"T={t}" for t in tokens), "|\n|---|" + "---|" * len(tokens))
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        cells = {int(r["tokens"]): float(r["us"]) for r in rows if r["kernel"] == kernel}
        print(
            f"| {kernel} |",
            " | ".join(f"{cells[t]:.1f} ({base[t] / cells[t]:.2f}x)" for t in tokens),
            "|",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="layer,transform,head,gemm")
    parser.add_argument("--models", default="llama-8b,llama-70b")
    parser.add_argument("--shapes", help="GEMMs in place of the models', as 4096x14336,8192x28672")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels.csv")
    parser.add_argument("--print", action="store_true", help="print the layer table at the end")
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    shapes = [shape for model in args.models.split(",") for shape in GEMMS[model]]
    if args.shapes:
        shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes.split(","))]
    compile_first(args.only, shapes, tokens, args.workers)
    record = Recorder(args.results)
    if "layer" in args.only:
        measure_layer(record, [t for t in tokens if t in (1, 16, 64, 256, 1024, 2048, 8192)])
    if "transform" in args.only:
        measure_transforms(record, [t for t in tokens if t in (1, 16, 256, 2048, 8192)])
    if "head" in args.only:
        measure_head(record, [t for t in tokens if t <= 256])
    if "gemm" in args.only:
        measure_gemms(record, shapes, tokens)
    if args.print:
        show(args.results, record.fixed["gpu"], record.fixed["commit"])


if __name__ == "__main__":
    main()
