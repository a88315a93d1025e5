"""Rewrite the results table of README.md from benchmarks/results/accuracy.csv."""

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)


def table(rows: list[dict[str, str]]) -> str:
    """One line per model and configuration, one column per text; the fullest set of windows counts."""
    texts = sorted({row["text"] for row in rows})
    windows = {t: max(int(row["windows"]) for row in rows if row["text"] == t) for t in texts}
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    used = []
    for row in rows:
        if int(row["windows"]) == windows[row["text"]]:
            values[row["model"], row["config"]][row["text"]].append(float(row["perplexity"]))
            used.append(row)
    lines = [
        "| model | configuration | " + " | ".join(f"{t} ({windows[t]} windows)" for t in texts) + " |",
        "|---|---|" + "---|" * len(texts),
    ]
    for (model, config), by_text in sorted(
        values.items(), key=lambda v: (v[0][0], v[0][1] != "unquantized")
    ):
        cells = [f"{mean(by_text[t]):.3f} ({len(by_text[t])})" if by_text[t] else "" for t in texts]
        lines.append(f"| {model} | {config} | " + " | ".join(cells) + " |")
    sources = {
        name: ", ".join(sorted({row[name] for row in used})) for name in ("device", "torch", "commit")
    }
    lines += [
        "",
        "In brackets: seeds. Measured on {device}; PyTorch {torch}; commit {commit}.".format(**sources),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    with (ROOT / "benchmarks/results/accuracy.csv").open(newline="") as file:
        new = table(list(csv.DictReader(file)))
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda m: m[1] + new + m[2], readme.read_text()))


if __name__ == "__main__":
    main()
