"""Rewrite the results table of README.md from benchmarks/results/accuracy.csv."""

import csv
import json
import re
from collections import defaultdict
from math import log
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)

BITS = re.compile(r"w(\d)a(\d+)(?:kv(\d))?")
"""In the name of a configuration: bits of weights, activations and KV cache."""


def order(config: str, by_text: dict[str, list[float]]) -> tuple[float, ...]:
    """Key of a line: unquantized first, then more bits before fewer, then lower perplexity before higher."""
    found = BITS.search(config)
    if found is None:
        return (0,)
    weight, activation, kv = found.groups()
    return (
        1,
        -int(activation),
        -int(kv or 16),
        -int(weight),
        mean(log(mean(v)) for v in by_text.values()),
    )


def chip(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``H100``."""
    return device.removeprefix("NVIDIA ").split(" ")[0]


def table(rows: list[dict[str, str]]) -> str:
    """For one model: a line per configuration, a column per text; the fullest set of windows counts."""
    texts = sorted({row["text"] for row in rows})
    windows = {t: max(int(row["windows"]) for row in rows if row["text"] == t) for t in texts}
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    used = [row for row in rows if int(row["windows"]) == windows[row["text"]]]
    for row in used:
        values[row["config"]][row["text"]].append(float(row["perplexity"]))
    model, seq_len = rows[0]["model"], rows[0]["seq_len"]
    lines = [
        f"| {model}, windows of {seq_len} | "
        + " | ".join(f"{t} ({windows[t]})" for t in texts)
        + " | seeds | seconds | GB | measured |",
        "|---|" + "---|" * (len(texts) + 4),
    ]
    for config, by_text in sorted(values.items(), key=lambda item: order(*item)):
        cells = [f"{mean(by_text[t]):.3f}" if by_text[t] else "" for t in texts]
        seeds = max(len(found) for found in by_text.values())
        runs = [row for row in used if row["config"] == config]
        timed = [float(r["seconds"]) for r in runs if r["seconds"]]  # none of runs that shared a GPU
        cost = [
            f"{mean(timed):.0f}" if timed else "",
            f"{max(float(r['peak_memory_gb']) for r in runs):.1f}",
            ", ".join(sorted({f"{chip(r['device'])} {r['commit']}" for r in runs})),
        ]
        lines.append(f"| {config} | " + " | ".join([*cells, str(seeds), *cost]) + " |")
    torch = ", ".join(sorted({row["torch"] for row in used}))
    settings = [json.loads(row["settings"]) for row in used if row["settings"] != "null"]
    how = ""
    if settings:
        first = settings[0]
        epochs = sorted({s["epochs"] for s in settings} - {0})
        many = " or ".join(map(str, epochs))
        how = f"Calibrated on {first['samples']} x {first['seq_len']} tokens, {many} epochs where any. "
        how = how.replace(" where any", "") if all(s["epochs"] for s in settings) else how
    lines += [
        "",
        how
        + "Seconds to quantize (none where runs shared a GPU; on a CPU beside other work), and peak GB while doing so. "
        + f"Measured: where, and at which commit; PyTorch {torch}.",
        "",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    with (ROOT / "benchmarks/results/accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = dict.fromkeys(row["model"] for row in rows)
    new = "".join(table([row for row in rows if row["model"] == model]) for model in models)
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda m: m[1] + new + m[2], readme.read_text()))


if __name__ == "__main__":
    main()
