"""The tables and the plot of `serving.py`'s results."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

KEY = ["gpu", "vllm", "commit", "model", "format", "measure"]
UNITS = {
    "weights": "weights GiB",
    "load_peak": "peak while loading GiB",
    "kv_tokens": "KV cache tokens",
    "start_cold": "cold start s",
    "start_warm": "warm start s",
    "start": "start with some caches s",
    "load": "load s",
    "compile": "compile s",
    "capture": "capture s",
}
"""Measures that are not times of a step -> the column's title."""
OWN = "own process"
"""Where the engine core ran (column ``engine``), as users get it. Old rows: "in-process", in the one that measured."""
NO_KERNEL = ("(wall", "(busy", "(idle")
"""How rows of a profile begin that are no kernels."""
Row = dict[str, Any]
Runs = dict[str, dict[str, dict[str, float]]]
"""format -> measure -> {"value", "ratio"}, medians over runs."""
RULE = (
    "Medians over all runs of this vLLM; for FlatQuant, whose code changes, over those of the newest commit "
    "that has the figure. A ratio is taken within a run."
)


def read_rows(results: Path) -> list[Row]:
    """All rows of a results file; none if there is no file."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def collect(rows: list[Row]) -> dict[tuple[str, str, str, str], Runs]:
    """(model, GPU, vLLM, engine) -> figures by ``RULE``. A ratio is bf16's value over the format's, of the same run."""
    base = {
        (r["run"], r["model"], r["measure"]): float(r["value"]) for r in rows if r["format"] == "bf16"
    }
    figures: dict[tuple[str, ...], dict[str, list[tuple[str, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    compared = {(r["run"], r["model"], r["measure"]) for r in rows if r["format"] != "bf16"}
    alone = {r["model"] for r in rows} - {model for _, model, _ in compared}
    for row in sorted(rows, key=lambda row: (row["date"], row["run"])):
        # bf16 counts where something else was measured in its run: what a run that was cut off has alone does not.
        at = row["run"], row["model"], row["measure"]
        if row["unit"] == "ms" and row["model"] not in alone and at not in compared:
            continue
        value, reference = float(row["value"]), base.get((row["run"], row["model"], row["measure"]))
        of = figures[row["model"], row["gpu"], row["vllm"], row["engine"], row["format"], row["measure"]]
        of["value"].append((row["commit"], value))
        if reference and value:
            higher_is_better = row["unit"] in ("tokens", "tokens/s", "requests/s")
            ratio = value / reference if higher_is_better else reference / value
            of["ratio"].append((row["commit"], ratio))
    found: dict[tuple[str, str, str, str], Runs] = defaultdict(lambda: defaultdict(dict))
    for (model, gpu, vllm, engine, name, measure), lists in figures.items():
        ours = name.startswith("flatquant")
        found[model, gpu, vllm, engine][name][measure] = {
            kind: median(v for commit, v in dated if not ours or commit == dated[-1][0])
            for kind, dated in lists.items()
        }
    return found


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _sorted(runs: Runs) -> list[str]:
    return sorted(runs, key=lambda name: (name != "bf16", name.startswith("flatquant"), name))


def _of(runs: Runs, prefixes: tuple[str, ...]) -> list[str]:
    names = dict.fromkeys(m for figures in runs.values() for m in figures if m.startswith(prefixes))
    return list(names)


def _ratio_table(runs: Runs, measures: list[str]) -> list[str]:
    """Ratios to bf16, whose line has milliseconds (or its unit); the best peer comes last. "-": no bf16 in that run."""
    lines = [_line(["", *(m.replace("_", " ") for m in measures)]), "|---" * (len(measures) + 1) + "|"]
    peers: dict[str, tuple[float, str]] = {}
    for name in _sorted(runs):
        cells = []
        for measure in measures:
            figure = runs[name].get(measure, {})
            ratio = figure.get("ratio")
            if runs[name].get("fits"):
                cells.append("does not fit")
            elif not figure:
                cells.append("")
            elif name == "bf16":
                cells.append(f"{figure['value']:.2f}")
            elif ratio is None:
                cells.append("-")
            else:
                cells.append(f"{ratio:.2f}")
                if not name.startswith("flatquant") and "ran as" not in name:
                    peers[measure] = max(peers.get(measure, (0.0, "")), (ratio, name))
        lines.append(_line([name if name != "bf16" else "bf16 (its own unit)", *cells]))
    best = [f"{peers[m][0]:.2f} ({peers[m][1]})" if m in peers else "" for m in measures]
    return [*lines, _line(["best other than FlatQuant", *best])]


def print_tables(
    results: Path, models: list[str] | None = None, formats: list[str] | None = None
) -> None:
    """Markdown: for each model and GPU a table of ratios of step times, one of live servers, one of memory.

    models, formats: of these alone, and bf16.
    """
    rows = [
        row
        for row in read_rows(results)
        if (not models or row["model"].split()[0] in models)
        and (not formats or row["format"].split(" (")[0] in ["bf16", *formats])
    ]
    if not rows:
        print(f"there are no such rows in {results}")
    for (model, gpu, vllm, engine), runs in collect(rows).items():
        print(f"\n{model} on {gpu}, vLLM {vllm}, engine {engine}.")
        steps = _of(runs, ("prefill_", "decode_"))
        if steps:
            print("\nRatio to bf16 of the same run, higher is better; bf16 in ms.\n")
            print("\n".join(_ratio_table(runs, steps)))
        live = _of(runs, ("throughput", "rate"))
        if live:
            print("\nLive server: ratio to bf16 of the same run.\n")
            print("\n".join(_ratio_table(runs, live)))
        columns = [name for name in UNITS if any(name in figures for figures in runs.values())]
        if columns:
            print("\n" + _line(["", *(UNITS[name] for name in columns)]))
            print("|---" * (len(columns) + 1) + "|")
            for name in _sorted(runs):
                values = [runs[name].get(column, {}).get("value") for column in columns]
                print(
                    _line(
                        [
                            name,
                            *(
                                "" if v is None else f"{v:,.0f}" if v >= 1000 else f"{v:.1f}"
                                for v in values
                            ),
                        ]
                    )
                )
        print(f"\n{RULE}")


def print_profile(rows: list[Row], most: int = 14) -> None:
    """The kernels that take longest in each phase, microseconds a step, and when the GPU had nothing to do."""
    phases = defaultdict(list)
    for row in rows:
        phases[row["phase"]].append(row)
    for phase, kernels in phases.items():
        others = [row for row in kernels if row["kernel"].startswith(NO_KERNEL)]
        wall = sum(row["us"] for row in others if row["kernel"].startswith("(wall"))
        kernels = [row for row in kernels if row not in others]
        busy = sum(row["us"] for row in kernels)
        print(f"  {phase}: {wall:.0f} us a step, kernels {busy:.0f} us")
        longest = sorted(kernels, key=lambda row: -row["us"])[:most]
        for row in longest + sorted(others, key=lambda row: -row["us"])[:most]:
            share = row["us"] / (wall if row in others else busy)
            print(f"    {row['us']:9.1f} us {share:6.1%} {row['count']:7.1f} x  {row['kernel'][:110]}")


def plot(results: Path, out: Path) -> None:
    """Ratios to bf16 of every format, a panel for each model and GPU on which a peer was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {
        key: runs
        for key, runs in collect(read_rows(results)).items()
        if any(name != "bf16" and not name.startswith("flatquant") for name in runs)
        and _of(runs, ("prefill_", "decode_"))
    }
    # What was measured as users get it makes the older figures of the same model and GPU superfluous.
    found = {key: runs for key, runs in found.items() if key[3] == OWN or (*key[:3], OWN) not in found}
    if not found:
        raise SystemExit(f"{results} has no peer beside bf16; measure fp8, say, first")
    # The panel with most formats first; a format has one colour in all of them.
    found = dict(sorted(found.items(), key=lambda item: -len(item[1])))
    every = _sorted({name: {} for runs in found.values() for name in runs if name != "bf16"})
    grays, greens = plt.get_cmap("Greys"), plt.get_cmap("viridis")
    ours = [name for name in every if name.startswith("flatquant")]
    peers = [name for name in every if name not in ours]
    color = {name: greens(0.15 + 0.75 * i / len(ours)) for i, name in enumerate(ours)}
    color |= {name: grays(0.25 + 0.55 * i / len(peers)) for i, name in enumerate(peers)}
    figure, panels = plt.subplots(len(found), 1, figsize=(10, 4.6 * len(found)), squeeze=False)
    for axes, ((model, gpu, vllm, _), runs) in zip(panels[:, 0], found.items(), strict=True):
        measures = _of(runs, ("prefill_", "decode_"))
        names = [n for n in _sorted(runs) if n != "bf16" and any(m in runs[n] for m in measures)]
        width = 0.8 / max(1, len(names))
        for index, name in enumerate(names):
            heights = [runs[name].get(m, {}).get("ratio", 0) for m in measures]
            places = [i - 0.4 + (index + 0.5) * width for i in range(len(measures))]
            axes.bar(places, heights, width * 0.92, color=color[name], label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(measures)), [m.replace("_", " ") for m in measures])
        axes.set_ylabel("speed relative to bf16")
        axes.set_title(f"{model}, {gpu}, vLLM {vllm}; random weights", fontsize=10)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
