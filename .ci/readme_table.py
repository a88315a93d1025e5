"""Rewrite the tables of results in README.md and docs/results.md from benchmarks/results/{accuracy,ablation,peers}.csv."""

import csv
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from accuracy_tables import UNQUANTIZED, Rows, Texts, by_config, table

README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "results.md")
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+): .*? -->\n).*?(<!-- end of table -->)", re.DOTALL)
FINAL = ("wikitext2-test", "python-heldout")
"""Texts that nothing was chosen by."""
FIRST = 96
"""Windows that other tools were measured on."""
LAST_STAGE = (
    "distill_epochs=8,distill_generated=2048,distill_batch_size=8,distill_lr=1e-3,distill_weight_lr=3e-3"
)
SHARED = 'epochs=15,diag_rows="normalized",widest_factor=128,precision="high"'
BLOCKS = {
    "flatquant-e2e-w4a16": f"w4a16,{SHARED}",
    "flatquant-e2e-w4a4": f'w4a4,rounding="gptq",{SHARED}',
    "flatquant-e2e-w4a4kv4": f'w4a4,kv=4,rounding="gptq",{SHARED}',
    "flatquant-e2e-w4a8": f'w4a8,rounding="gptq",{SHARED}',
}
"""Recipe -> its stage block by block as ablation.csv writes it; ``LAST_STAGE`` follows."""
SIZES = {"samples": 128, "seq_len": 1024}
"""Calibration of all of them."""
STAGES = ("blocks_seconds", "written_seconds", "last_seconds")
AIMS = {
    "flatquant-e2e-w4a16": (34.2, 5.55),
    "flatquant-e2e-w4a4": (35.1, 5.67),
    "flatquant-e2e-w4a4kv4": (35.4, 5.70),
}
"""Set beforehand for ``FINAL``: about half of what FlatQuant's own code loses."""

SHORT = {
    "flatquant-wide-w4a8": "the first to try, for few tokens at a time and for many: runs the kernels of W4A4",
    "flatquant-e2e-w4a8": "the same, for models of up to about a billion weights",
    "flatquant-wide-w4a4": "to compare at 4-bit activations; no faster than W4A8",
    "flatquant-e2e-w4a4": "the same, for models of up to about a billion weights",
    "flatquant-wide-w4a16": "GPUs that do not multiply int8 fast; vLLM's weight-only kernels",
    "flatquant-e2e-w4a16": "the same, for models of up to about a billion weights",
}
"""Recipe -> when to use it, at the top of the page."""
CHOSEN = {
    "W4A16": ("flatquant-e2e-w4a16", "flatquant-wide-w4a16", "flatquant-w4a16", "gptq-w4a16", "qronos-w4a16"),
    "W4A8": ("flatquant-e2e-w4a8", "flatquant-wide-w4a8", "flatquant-w4a8", "smoothquant-w4a8"),
    "W4A4": (
        "flatquant-e2e-w4a4", "flatquant-wide-w4a4", "flatquant-w4a4", "flatquant-w4a4-gptq", "quarot-w4a4", "spinquant-w4a4",
        "qronos-w4a4",
    ),
    "W4A4KV4": (
        "flatquant-e2e-w4a4kv4", "flatquant-wide-w4a4kv4", "flatquant-w4a4kv4", "flatquant-w4a4kv4-gptq", "quarot-w4a4kv4",
        "spinquant-w4a4kv4",
    ),
}  # fmt: skip
"""Bits -> recipes of README.md's comparison, as far as they were measured; docs/results.md has all of them."""
DECIDING = (
    "flatquant-e2e-w4a16", "flatquant-wide-w4a16", "flatquant-w4a16-g128-gptq", "gptq-w4a16-g128", "flatquant-e2e-w4a4",
    "flatquant-wide-w4a4",
)  # fmt: skip
"""Recipes beside other tools in README.md; docs/results.md has all of them."""


def usual(rows: Rows) -> Rows:
    """Of one model's rows those of recipes as they are, calibrated on what most rows are."""
    calib = Counter(row["calib"] for row in rows).most_common(1)[0][0]
    return [r for r in rows if ":" not in r["config"] and calib == r["calib"]]


def as_recipes(rows: Rows) -> Rows:
    """Of the rows of ablation.csv those of the recipes ``BLOCKS``, and of the first stage alone (``flatquant-wide-*``),
    as rows of accuracy.csv, in the order of seeds."""
    names = {f"{blocks};{LAST_STAGE}": name for name, blocks in BLOCKS.items()}
    names |= {f"{blocks};": name.replace("e2e", "wide") for name, blocks in BLOCKS.items()}
    found = []
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        if name := names.get(row["variant"]):
            seconds = sum(float(row[part] or 0) for part in STAGES) if row["jobs"] else ""
            epochs = int(row["variant"].partition("epochs=")[2].partition(",")[0])
            settings = json.dumps({**SIZES, "epochs": epochs, "recipe": name})
            found.append({**row, "config": name, "seconds": str(seconds), "settings": settings})
    return found


def on(rows: Rows, counts: Sequence[int]) -> Rows:
    """The rows of the texts ``FINAL``, on the numbers of windows ``counts``."""
    wanted = {(text, str(count)) for text, count in zip(FINAL, counts, strict=True)}
    return [row for row in rows if (row["text"], row["windows"]) in wanted]


def mean_or_empty(values: Sequence[float]) -> str:
    """Their mean, or nothing."""
    return f"{mean(values):.3f}" if values else ""


def with_losses(found: Texts, original: Texts) -> str:
    """Cells of the texts ``FINAL``: perplexity, and in brackets how much of it quantization added."""
    pairs = [(mean(found[text]), mean(original[text])) for text in FINAL]
    return " | ".join(f"{value:.3f} ({value / before - 1:+.1%})" for value, before in pairs)


def in_short(rows: Rows) -> str:
    """The recipes ``SHORT``: perplexity, how much of it quantization added, and when to use each."""
    values = by_config(on(rows, (354, 390)))
    original = values[UNQUANTIZED]
    lines = [f"| recipe | {' | '.join(FINAL)} | use it for |", "|---|---|---|---|"]
    unquantized = " | ".join(mean_or_empty(original[text]) for text in FINAL)
    lines.append(f"| unquantized | {unquantized} | |")
    for name, use in SHORT.items():
        lines.append(f"| `{name}` | {with_losses(values[name], original)} | {use} |")
    return "\n".join(lines) + "\n"


def chosen(rows: Rows) -> str:
    """Of the recipes ``CHOSEN`` those that were measured, by bits, the lowest perplexity first."""
    values = by_config(on(rows, (354, 390)))
    original = values[UNQUANTIZED]
    lines = [f"| | recipe | {' | '.join(FINAL)} | seeds |", "|---|---|---|---|---|"]
    unquantized = " | ".join(mean_or_empty(original[text]) for text in FINAL)
    lines.append(f"| | unquantized | {unquantized} | |")
    for bits, names in CHOSEN.items():
        known = [name for name in names if name in values]
        for name in sorted(known, key=lambda n: mean(log(mean(values[n][t])) for t in FINAL)):
            cells, seeds = with_losses(values[name], original), len(values[name][FINAL[0]])
            lines.append(f"| {bits} | `{name}` | {cells} | {seeds} |")
    return "\n".join(lines) + "\n"


def frontier(ablation: Rows, peers: Rows) -> str:
    """The recipes with an end-to-end stage: before and after it, each seed, aim, and FlatQuant's own code."""
    lines = [
        "| | | own code: RTN / GPTQ | block by block | and end to end | by seed | aim | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    last = by_config(on(as_recipes(ablation), (354, 390)))
    for name, aims in AIMS.items():
        bits = name.rpartition("-")[2]
        own = by_config(
            [{**r, "config": r["system"]} for r in on(peers, (354, 390)) if r["bits"] == bits]
        )
        plain = by_config(
            [{**r, "config": ""} for r in on(ablation, (354, 390)) if r["variant"] == f"{BLOCKS[name]};"]
        )
        for text, aim in zip(FINAL, aims, strict=True):
            after = last[name][text]
            missed = mean(after) - aim
            cells = [
                " / ".join(f"{v:.3f}" for system in own.values() for v in system[text]),
                f"{mean_or_empty(plain[''][text])} ({len(plain[''][text])})",
                f"**{mean_or_empty(after)}**",
                " ".join(f"{v:.3f}" for v in after),
                f"{aim:.2f}",
                f"{'missed' if missed > 0 else 'met'} by {abs(missed):.2g}",
            ]
            lines.append(f"| {bits.upper()} | {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def beside_peers(rows: Rows, peers: Rows) -> str:
    """Other tools and ours at the same bits, best first, on the windows that they were measured on."""
    ours = by_config(on(rows, (FIRST, FIRST)))
    theirs: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for row in on(peers, (FIRST, FIRST)):
        theirs[row["bits"], row["system"], row["group_size"]][row["text"]] = row["perplexity"]
    original = ours.pop(UNQUANTIZED)
    lines = [
        f"| first {FIRST} windows | weights that share a scale | {' | '.join(FINAL)} | seeds |",
        "|---|---|---|---|---|",
        f"| unquantized | | {' | '.join(mean_or_empty(original[t]) for t in FINAL)} | |",
    ]
    for bits in dict.fromkeys(bits for bits, *_ in theirs):
        found: list[tuple[float, str]] = []
        for (peer_bits, system, group), cells in theirs.items():
            if peer_bits == bits:
                key = mean(log(float(cells[t])) for t in FINAL)
                cell = " | ".join(cells[t] for t in FINAL)
                found.append((key, f"| *{system}, {bits.upper()}* | {group} | {cell} | 1 |"))
        for config, texts in ours.items():
            if f"-{bits}-" in f"{config}-":
                key = mean(log(mean(texts[t])) for t in FINAL)
                cell = " | ".join(mean_or_empty(texts[t]) for t in FINAL)
                group = "128" if "-g128" in config else "a row"
                found.append((key, f"| `{config}` | {group} | {cell} | {len(texts[FINAL[0]])} |"))
        lines += [line for _, line in sorted(found)]
    return "\n".join(lines) + "\n"


def other_texts(rows: Rows) -> str:
    """One model's rows by calibration text, where it is not the usual one."""
    main = usual(rows)[0]["calib"]
    found = by_config(
        [{**r, "config": r["calib"]} for r in rows if r["calib"] != main and r["config"] != UNQUANTIZED]
    )
    texts = sorted({text for by_text in found.values() for text in by_text})
    lines = [f"| calibrated on | {' | '.join(texts)} |", "|---|" + "---|" * len(texts)]
    for calib, by_text in found.items():
        name = calib.removeprefix("calib_").removesuffix(".npy")
        lines.append(f"| {name} | {' | '.join(mean_or_empty(by_text[t]) for t in texts)} |")
    return "\n".join(lines) + "\n"


def latest(rows: Rows) -> Rows:
    """Of rows of ablation.csv that measured the same, the last."""
    same = ("model", "variant", "seed", "calib", "samples", "text", "windows")
    return list({tuple(row[k] for k in same): row for row in rows}.values())


def read(name: str) -> Rows:
    """All rows of a file of results."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def comparison_rows() -> dict[str, Rows]:
    """Model -> the rows that its table shows."""
    rows, models = read("accuracy"), {}
    same = ("model", "config", "seed", "text", "windows")
    there = {tuple(row[k] for k in same) for row in rows}
    more = [r for r in as_recipes(latest(read("ablation"))) if tuple(r[k] for k in same) not in there]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = usual([row for row in rows if row["model"] == model])
        models[model] = own + [row for row in more if row["model"] == model]
    return models


def tables() -> dict[str, str]:
    """Name in a page -> table."""
    models = comparison_rows()
    large = next(iter(models))
    return {
        "short": in_short(models[large]),
        "chosen": chosen(models[large]),
        "comparison": "".join(table(rows) for rows in models.values()),
        "frontier": frontier(latest(read("ablation")), read("peers")),
        "deciding": beside_peers(
            [r for r in models[large] if r["config"] in (UNQUANTIZED, *DECIDING)], read("peers")
        ),
        "peers": beside_peers(models[large], read("peers")),
        "texts": other_texts([row for row in read("accuracy") if row["model"] == large]),
    }


def with_tables(page: str) -> str:
    """The page with the tables of today's results."""
    new = tables()
    return BLOCK.sub(lambda m: m[1] + new[m[2]] + m[3], page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
