"""The kernels' results as Markdown: speed against bf16 for each number of tokens, ours and every peer's.

    python benchmarks/kernel_tables.py [--results benchmarks/results/kernels.csv]

Every table is of one GPU and one commit, the last that measured most of it, so that a ratio never spans two runs.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

Shape = tuple[int, int]
Times = dict[str, dict[int, float]]  # kernel -> tokens -> microseconds
Row = dict[str, str]

MODELS: dict[str, tuple[Shape, ...]] = {
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
BASE = "bf16 cuBLAS"
OURS = "w4_gemm"
PEER = "vLLM"
BESIDE = {
    "kron_quant": "clone",
    "kron_quant head": "clone",
    "rmsnorm_kron_quant": "vLLM fused_add_rms_norm",
    "silu_mul_kron_quant": "vLLM silu_and_mul",
    "kron": "clone",
    "rmsnorm_kron": "vLLM fused_add_rms_norm, then kron",
    "silu_mul_kron": "vLLM silu_and_mul, then kron",
}
"""What a transform is compared with."""
LAYER = {  # a line of the layer's table: what it divides by what
    "with norm, SiLU*mul and transforms (bf16: without)": BASE,
    "with norm, SiLU*mul and transforms (bf16: with vLLM's)": "bf16 cuBLAS with vLLM's norm and SiLU*mul",
}


def times(rows: list[Row], question: str, shapes: tuple[Shape, ...]) -> Times:
    """Microseconds over all ``shapes`` for each kernel and number of tokens, where every shape was measured."""
    found: dict[tuple[str, int], dict[Shape, float]] = defaultdict(dict)
    for row in rows:
        shape = int(row["n"]), int(row["k"])
        if row["question"] == question and shape in shapes:
            found[row["kernel"], int(row["tokens"])][shape] = float(row["us"])
    total: Times = defaultdict(dict)
    for (kernel, tokens), by_shape in sorted(found.items()):
        if len(by_shape) == len(shapes):
            total[kernel][tokens] = sum(by_shape.values())
    return dict(total)


def ratios(us: dict[int, float], than: dict[int, float]) -> dict[int, str]:
    return {t: f"{than[t] / us[t]:.2f}" for t in us if t in than}


def lines(title: str, tokens: list[int], cells: dict[str, dict[int, str]]) -> str:
    """A Markdown table with a column for each number of tokens; a cell that was not measured stays empty."""
    table = [f"| {title} | " + " | ".join(map(str, tokens)) + " |", "|---|" + "---|" * len(tokens)]
    table += [
        f"| {name} | " + " | ".join(by.get(t, "") for t in tokens) + " |" for name, by in cells.items()
    ]
    return "\n".join(table) + "\n"


def gemm_table(title: str, total: Times, layer: Times) -> str:
    """Times the speed of bf16, ours first; the fastest kernel of a column is bold."""
    tokens = sorted(total[BASE])
    best = {t: min(by[t] for by in total.values() if t in by) for t in tokens}
    cells = {f"{BASE}, us": {t: f"{us:.0f}" for t, us in total[BASE].items()}}
    for kernel in sorted(total, key=lambda name: (not name.startswith(OURS), name)):
        if kernel != BASE:
            us = total[kernel]
            cells[kernel] = {
                t: f"**{ratio}**" if us[t] == best[t] else ratio
                for t, ratio in ratios(us, total[BASE]).items()
            }
        if kernel == OURS:
            whole = layer.get("w4_gemm with norm, SiLU*mul and transforms", {})
            cells |= {name: ratios(whole, layer[than]) for name, than in LAYER.items() if than in layer}
    return lines(title, tokens, cells)


def behind(rows: list[Row], shapes: tuple[Shape, ...]) -> str:
    """Where a peer was faster than ours, shape by shape."""
    found = []
    for n, k in shapes:
        by = times(rows, "gemm", ((n, k),))
        peers = [name for name in by if name.startswith(PEER)]
        for t, us in by.get(OURS, {}).items():
            first = min((by[name][t], name) for name in peers if t in by[name]) if peers else (us, "")
            if first[0] < us:
                found.append(f"{n}x{k} at {t} tokens ({us:.1f} us, {first[1]} {first[0]:.1f})")
    return "Behind a peer: " + ("; ".join(found) or "nowhere") + ".\n"


def transform_table(title: str, by: Times) -> str:
    """Microseconds, and in brackets how many times what the transform is compared with takes."""
    cells: dict[str, dict[int, str]] = {}
    for kernel, us in by.items():
        than = by.get(BESIDE.get(kernel, ""), {})
        name = f"{kernel} (/ {BESIDE[kernel]})" if than else kernel
        cells[name] = {
            t: f"{value:.1f}" + (f" ({value / than[t]:.2f})" if t in than else "")
            for t, value in us.items()
        }
    return lines(title, sorted({t for us in by.values() for t in us}), cells)


def last(runs: dict[str, list[Row]], size: Callable[[list[Row]], int]) -> tuple[str, list[Row]]:
    """The commit, and its rows, whose ``size`` is largest; of equal ones the last."""
    commit = max(reversed(runs), key=lambda name: size(runs[name]))
    return commit, runs[commit]


def gemm_part(name: str, gpu: str, runs: dict[str, list[Row]]) -> list[str]:
    shapes = MODELS[name]

    def size(rows: list[Row]) -> int:
        total = times(rows, "gemm", shapes)
        return sum(map(len, total.values())) if BASE in total and OURS in total else 0

    commit, rows = last(runs, size)
    if not size(rows):
        return []
    layer = times(rows, "layer", ((0, 0),)) if name == "Llama-3-8B" else {}
    title = f"{name}, {gpu}, commit {commit}"
    found = [gemm_table(title, times(rows, "gemm", shapes), layer)]
    measured = {(int(r["n"]), int(r["k"])) for r in rows if r["kernel"].startswith(PEER)}
    some = tuple(shape for shape in shapes if shape in measured)
    if some and some != shapes:  # the peers were cut off
        where = ", ".join(f"{n}x{k}" for n, k in some)
        found.append(gemm_table(f"{title} ({where})", times(rows, "gemm", some), {}))
    return [*found, behind(rows, shapes)] if some else found


def tables(rows: list[Row]) -> str:
    """Every table that ``rows`` hold."""
    found = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        runs: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if row["gpu"] == gpu:
                runs[row["commit"]].append(row)
        for name in MODELS:
            found += gemm_part(name, gpu, runs)
        for question, what in (
            ("transform", "width {1}, R {0}x{0}, us"),
            ("head", "output head {0}x{1}, us"),
        ):
            shapes = {(int(r["n"]), int(r["k"])) for r in rows if r["question"] == question}
            for shape in sorted(shapes):

                def size(rows: list[Row], question: str = question, shape: Shape = shape) -> int:
                    return sum(map(len, times(rows, question, (shape,)).values()))

                commit, run = last(runs, size)
                if size(run):
                    title = f"{what.format(*shape)}, {gpu}, commit {commit}"
                    found.append(transform_table(title, times(run, question, (shape,))))
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(__file__).parent / "results" / "kernels.csv"
    parser.add_argument("--results", type=Path, default=results)
    with parser.parse_args().results.open(newline="") as file:
        print(tables(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
