"""Rewrite the tables of README.md's results from benchmarks/results/{accuracy,ablation,peers}.csv."""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+): .*? -->\n).*?(<!-- end of table -->)", re.DOTALL)
Rows = list[dict[str, str]]
Texts = dict[str, list[float]]
"""Text -> perplexity of each run."""

UNQUANTIZED = "unquantized"
FINAL = ("wikitext2-test", "python-heldout")
"""Texts that nothing was chosen by."""
FIRST = 96
"""Windows that other tools were measured on."""
LAST_STAGE = (
    "distill_epochs=3,distill_generated=2048,distill_batch_size=8,distill_lr=3e-3,distill_weight_lr=3e-3,"
    'precision="high"'
)
BLOCKS = {
    "flatquant-e2e-w4a16": 'w4a16,epochs=5,diag_rows="normalized"',
    "flatquant-e2e-w4a4": 'w4a4,rounding="gptq",epochs=5,diag_rows="normalized"',
    "flatquant-e2e-w4a4kv4": 'w4a4,kv=4,rounding="gptq",epochs=5,diag_rows="normalized"',
}
"""Recipe -> its stage block by block as ablation.csv writes it; ``LAST_STAGE`` follows."""
SIZES = {"samples": 128, "seq_len": 1024, "epochs": 5}
"""Calibration of all of them."""
AIMS = {
    "flatquant-e2e-w4a16": (34.2, 5.55),
    "flatquant-e2e-w4a4": (35.1, 5.67),
    "flatquant-e2e-w4a4kv4": (35.4, 5.70),
}
"""Set beforehand for ``FINAL``: about half of what FlatQuant's own code loses."""

BITS = re.compile(r"w(\d)a(\d+)(?:kv(\d))?")
"""In the name of a configuration: bits of weights, activations and KV cache."""


def order(config: str, by_text: Texts) -> tuple[float, ...]:
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


def by_config(rows: Rows) -> dict[str, Texts]:
    """Configuration -> text -> perplexities."""
    values: dict[str, Texts] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["config"]][row["text"]].append(float(row["perplexity"]))
    return values


def usual(rows: Rows) -> Rows:
    """Of one model's rows those of recipes as they are, calibrated on what most rows are."""
    calib = Counter(row["calib"] for row in rows).most_common(1)[0][0]
    return [r for r in rows if ":" not in r["config"] and calib == r["calib"]]


def end_to_end(rows: Rows) -> Rows:
    """Of the rows of ablation.csv those of the recipes ``BLOCKS``, as rows of accuracy.csv."""
    names = {f"{blocks};{LAST_STAGE}": name for name, blocks in BLOCKS.items()}
    found = [(names[row["variant"]], row) for row in rows if row["variant"] in names]
    return [
        # Jobs shared the GPU, so there are no seconds.
        {**r, "config": name, "seconds": "", "settings": json.dumps({**SIZES, "recipe": name})}
        for name, r in found
    ]


def chip(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``H100``."""
    return device.removeprefix("NVIDIA ").split(" ")[0]


def table(rows: Rows) -> str:
    """For one model: a line per configuration, a column per text; the fullest set of windows counts."""
    texts = sorted({row["text"] for row in rows})
    windows = {t: max(int(row["windows"]) for row in rows if row["text"] == t) for t in texts}
    used = [row for row in rows if int(row["windows"]) == windows[row["text"]]]
    values = by_config(used)
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


def on(rows: Rows, counts: Sequence[int]) -> Rows:
    """The rows of the texts ``FINAL``, on the numbers of windows ``counts``."""
    wanted = {(text, str(count)) for text, count in zip(FINAL, counts, strict=True)}
    return [row for row in rows if (row["text"], row["windows"]) in wanted]


def mean_or_empty(values: Sequence[float]) -> str:
    """Their mean, or nothing."""
    return f"{mean(values):.3f}" if values else ""


def frontier(ablation: Rows, peers: Rows) -> str:
    """The recipes with an end-to-end stage: before and after it, each seed, aim, and FlatQuant's own code."""
    lines = [
        "| | | own code: RTN / GPTQ | block by block | and end to end | by seed | aim | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    last = by_config(on(end_to_end(ablation), (354, 390)))
    for name, blocks in BLOCKS.items():
        bits = name.rpartition("-")[2]
        own = by_config(
            [{**r, "config": r["system"]} for r in on(peers, (354, 390)) if r["bits"] == bits]
        )
        plain = by_config(
            [{**r, "config": ""} for r in on(ablation, (354, 390)) if r["variant"] == f"{blocks};"]
        )
        for text, aim in zip(FINAL, AIMS[name], strict=True):
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


def read(name: str) -> Rows:
    """All rows of a file of results."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def comparison_rows() -> dict[str, Rows]:
    """Model -> the rows that its table shows."""
    rows, models = read("accuracy"), {}
    for model in dict.fromkeys(row["model"] for row in rows):
        more = [r for r in end_to_end(read("ablation")) if r["model"] == model]
        models[model] = usual([row for row in rows if row["model"] == model]) + more
    return models


def tables() -> dict[str, str]:
    """Name in README.md -> table."""
    models = comparison_rows()
    large = next(iter(models))
    return {
        "comparison": "".join(table(rows) for rows in models.values()),
        "frontier": frontier(read("ablation"), read("peers")),
        "peers": beside_peers(models[large], read("peers")),
        "texts": other_texts([row for row in read("accuracy") if row["model"] == large]),
    }


def with_tables(page: str) -> str:
    """The page with the tables of today's results."""
    new = tables()
    return BLOCK.sub(lambda m: m[1] + new[m[2]] + m[3], page)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
