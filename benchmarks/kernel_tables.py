"""The kernels' results as Markdown: speed against bf16 for each number of tokens, ours and every peer's.

    python benchmarks/kernel_tables.py [--results benchmarks/results/kernels.csv]

For each GPU the rows of the last commit that measured a whole model are taken, so that a ratio never spans two runs.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

MODELS = {
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
BASE = "bf16 cuBLAS"
OURS = "w4_gemm"
Row = dict[str, str]


def sums(rows: list[Row], shapes: tuple[tuple[int, int], ...]) -> dict[str, dict[int, float]]:
    """Microseconds over all ``shapes`` for each kernel and number of tokens, where every shape was measured."""
    found: dict[tuple[str, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        shape = int(row["n"]), int(row["k"])
        if row["question"] == "gemm" and shape in shapes:
            found[row["kernel"], int(row["tokens"])][shape] = float(row["us"])
    total: dict[str, dict[int, float]] = defaultdict(dict)
    for (kernel, tokens), by_shape in sorted(found.items()):
        if len(by_shape) == len(shapes):
            total[kernel][tokens] = sum(by_shape.values())
    return total


def parts(
    rows: list[Row], shapes: tuple[tuple[int, int], ...]
) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """All shapes, and those that a peer was measured on where they are fewer, each with a title."""
    peers = {(int(r["n"]), int(r["k"])) for r in rows if r["kernel"].startswith("vLLM")}
    common = tuple(shape for shape in shapes if shape in peers)
    some = ", ".join(f"{n}x{k}" for n, k in common)
    return [("", shapes)] + ([(f" ({some})", common)] if common and common != shapes else [])


def markdown(title: str, total: dict[str, dict[int, float]]) -> str:
    """A line per kernel, a column per number of tokens: times the speed of bf16; the fastest of a column is bold."""
    tokens = sorted(total[BASE])
    lines = [f"| {title} | " + " | ".join(map(str, tokens)) + " |", "|---|" + "---|" * len(tokens)]
    lines.append(f"| {BASE}, us | " + " | ".join(f"{total[BASE][t]:.0f}" for t in tokens) + " |")
    best = {t: min(by[t] for by in total.values() if t in by) for t in tokens}
    for kernel in sorted(total, key=lambda name: (not name.startswith(OURS), name)):
        if kernel != BASE:
            cells = []
            for t in tokens:
                us = total[kernel].get(t)
                ratio = "" if us is None else f"{total[BASE][t] / us:.2f}"
                cells.append(f"**{ratio}**" if us == best[t] else ratio)
            lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def last_runs(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(GPU, commit) -> rows, for the last commit of each GPU that measured a peer."""
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["gpu"], row["commit"]].append(row)
    whole = [key for key, run in runs.items() if any(r["kernel"].startswith("vLLM") for r in run)]
    return {key: runs[key] for key in {gpu: (gpu, commit) for gpu, commit in whole}.values()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(__file__).parent / "results" / "kernels.csv"
    parser.add_argument("--results", type=Path, default=results)
    with parser.parse_args().results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for (gpu, commit), run in last_runs(rows).items():
        for name, shapes in MODELS.items():
            for title, part in parts(run, shapes):
                total = sums(run, part)
                if BASE in total and OURS in total:
                    print(markdown(f"{name}{title}, {gpu}, commit {commit}", total))


if __name__ == "__main__":
    main()
