"""The table and the plot of `accuracy.py`'s results."""

import json
import re
from collections import defaultdict
from math import inf, log
from pathlib import Path
from statistics import mean

Rows = list[dict[str, str]]
Texts = dict[str, list[float]]
"""Text -> perplexity of each run."""

UNQUANTIZED = "unquantized"
BITS = re.compile(r"w(\d)a(\d+)(?:kv(\d))?")
"""In the name of a configuration: bits of weights, activations and KV cache."""
FAR = 1.25
"""In the plot, times the unquantized perplexity: what is beyond lies at the edge."""


def bits_of(row: dict[str, str]) -> tuple[int, int, int] | None:
    """Bits of weights, activations and KV cache, by the row's settings or else its name; None if unquantized."""
    settings = json.loads(row["settings"]) or {}
    found = BITS.search(settings.get("scheme", row["config"]))
    if found is None:
        return None
    weight, activation, kv = found.groups()
    return int(weight), int(activation), int(settings.get("kv", kv or 16))


def by_config(rows: Rows) -> dict[str, Texts]:
    """Configuration -> text -> perplexities."""
    values: dict[str, Texts] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["config"]][row["text"]].append(float(row["perplexity"]))
    return values


def fullest(rows: Rows) -> tuple[dict[str, int], Rows]:
    """The largest number of windows of each text, and the rows that have so many."""
    windows = {
        text: max(int(row["windows"]) for row in rows if row["text"] == text)
        for text in sorted({row["text"] for row in rows})
    }
    return windows, [row for row in rows if int(row["windows"]) == windows[row["text"]]]


def chip(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``H100``."""
    return device.removeprefix("NVIDIA ").split(" ")[0]


def seconds_of(runs: Rows) -> str:
    """Mean seconds of the runs that shared the device with the fewest others, and in brackets how many jobs there
    were, unless one, or a question mark where no row tells; empty if nothing was timed."""
    timed: dict[float, list[float]] = defaultdict(list)
    for row in runs:
        if float(row["seconds"] or 0):
            timed[int(row.get("jobs") or 0) or inf].append(float(row["seconds"]))
    if not timed:
        return ""
    jobs = min(timed)
    return f"{mean(timed[jobs]):.0f}" + ("" if jobs == 1 else f" ({'?' if jobs == inf else jobs})")


def table(rows: Rows) -> str:
    """For one model: a line per configuration, a column per text; the fullest set of windows counts, for the seconds
    any. Unquantized first, then more bits before fewer, then lower perplexity before higher."""
    windows, used = fullest(rows)
    values, bits = by_config(used), {row["config"]: bits_of(row) for row in used}

    def order(config: str) -> tuple[float, ...]:
        found, perplexity = bits[config], mean(log(mean(v)) for v in values[config].values())
        if found is None:
            return (0,)
        weight, activation, kv = found
        return 1, -activation, -kv, -weight, perplexity

    lines = [
        f"| {rows[0]['model']}, windows of {rows[0]['seq_len']} | "
        + " | ".join(f"{text} ({count})" for text, count in windows.items())
        + " | seeds | seconds | GB | measured |",
        "|---|" + "---|" * (len(windows) + 4),
    ]
    for config in sorted(values, key=order):
        by_text = values[config]
        runs = [row for row in used if row["config"] == config]
        cells = [f"{mean(by_text[t]):.3f}" if by_text[t] else "" for t in windows]
        cells += [
            str(max(len(found) for found in by_text.values())),
            seconds_of([row for row in rows if row["config"] == config]),
            f"{max(float(row['peak_memory_gb']) for row in runs):.1f}",
            ", ".join(sorted({f"{chip(row['device'])} {row['commit']}" for row in runs})),
        ]
        lines.append(f"| {config} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", footnote(used), ""]) + "\n"


def footnote(rows: Rows) -> str:
    """What the columns of ``table`` mean, and on how much text these rows were calibrated."""
    notes, settings = [], [json.loads(row["settings"]) for row in rows if row["settings"] != "null"]
    if settings:
        epochs = " or ".join(str(n) for n in sorted({s["epochs"] for s in settings} - {0}))
        epochs = f", {epochs} epochs" if epochs else ""
        if epochs and not all(s["epochs"] for s in settings):
            epochs += " where any"
        notes.append(
            f"Calibrated on {settings[0]['samples']} x {settings[0]['seq_len']} tokens{epochs}."
        )
    notes.append(
        "Seconds to quantize, in brackets how many jobs shared the device (none: it was alone; ?: not recorded),"
    )
    notes.append("and peak GB while doing so. Measured: where, and at which commit;")
    notes.append(f"PyTorch {', '.join(sorted({row['torch'] for row in rows}))}.")
    return " ".join(notes)


def plot(rows: Rows, file: Path) -> None:
    """Dots of perplexity, mean over seeds, a line for each configuration (best first, by all texts) and a panel for
    each text, its unquantized perplexity as a dashed line. Colours: bits of activations. What is far off lies at the
    edge with its figure. rows: of the CSV, one model's."""
    from matplotlib import pyplot

    windows, used = fullest(rows)
    found = by_config(used)
    original = found.pop(UNQUANTIZED, {})
    configs = sorted(found, key=lambda c: -mean(log(mean(v)) for v in found[c].values()))
    figure, panels = pyplot.subplots(
        1,
        len(windows),
        figsize=(2 + 3 * len(windows), 1 + 0.25 * len(configs)),
        squeeze=False,
        sharey=True,
    )
    bits = {row["config"]: found_bits[1] for row in used if (found_bits := bits_of(row))}
    colours = dict(
        zip(sorted(set(bits.values())), ("tab:blue", "tab:orange", "tab:green"), strict=False)
    )
    for (text, count), axes in zip(windows.items(), panels[0], strict=True):
        values = {c: mean(found[c][text]) for c in configs if text in found[c]}
        edge = FAR * mean(original.get(text) or values.values())
        axes.set_xlim(min([*values.values(), edge / FAR]) * 0.98, edge)
        for a, colour in colours.items():
            near = {c: v for c, v in values.items() if bits[c] == a and v <= edge}
            axes.plot(
                [*near.values()], [configs.index(c) for c in near], "o", color=colour, label=f"A{a}"
            )
        for c, value in values.items():
            if value > edge:
                look = {"ha": "right", "va": "center", "fontsize": 8, "color": colours[bits[c]]}
                axes.text(edge, configs.index(c), f"{value:.4g} \N{RIGHTWARDS ARROW}", **look)
        if text in original:
            axes.axvline(mean(original[text]), color="0.6", linestyle="--")
        axes.set_yticks(range(len(configs)), configs)
        axes.set_ylim(-0.7, len(configs) - 0.3)
        axes.set_title(f"{text} ({count} windows)", fontsize=9)
        axes.set_xlabel("perplexity")
        axes.grid(axis="y", color="0.9")
    panels[0][0].legend(title="activations", fontsize=8, title_fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(file, dpi=90)
