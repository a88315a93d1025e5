"""Perplexity of quantized models: one row per configuration, seed and text.

    python benchmarks/accuracy.py --model DIR --calib FILE.npy --text wikitext2=FILE.npy \
        --text python=FILE.txt --config comparison --seeds 3 --plot comparison.png

A configuration is a recipe (``flatquant recipes`` lists them; a YAML file does too), ``comparison`` (one of each
system), or a name of the table's older rows, each with changes behind a colon: ``quarot-w4a4:kv=8,shards=2``.
All calibrate on the same tokens (rows of another --calib are rows of their own). Rows go to benchmarks/results/accuracy.csv as they come, with seconds and peak
memory; a row that is there already (same model, text, windows, configuration, seed and calibration text) is not run again. Seeds are the
outer loop. Several jobs can share one GPU (--jobs); their seconds would say nothing and are left out. A job that
fails is reported and the others go on. ``--plot`` draws what the CSV has of this model and these texts.
"""

import argparse
import csv
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
import transformers
from judging import FLATNESS, appended, judge, left_of, window_counts
from timing import commit
from workers import run_jobs

from vllm_flatquant import __version__
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.meter import peak_memory
from vllm_flatquant.calibration.quantize import choose_device, quantize
from vllm_flatquant.calibration.recipe import Recipe
from vllm_flatquant.calibration.recipes import RECIPES, choose_recipe
from vllm_flatquant.calibration.reference import load_reference

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
FIELDS = [
    "model",
    "text",
    "config",
    "seed",
    "perplexity",
    "windows",
    "seq_len",
    "settings",
    "calib",
    "seconds",
    "peak_memory_gb",
    "device",
    "torch",
    "transformers",
    "version",
    "commit",
    *FLATNESS,
]
OLDER: dict[str, tuple[str, dict]] = {
    "w4a4-rtn": ("flatquant-w4a4", {}),
    "w4a4-gptq": ("flatquant-w4a4-gptq", {}),
    "w4a8-rtn": ("flatquant-w4a8", {}),
    "w4a16-rtn": ("flatquant-w4a16", {}),
    "w4a16-gptq": ("flatquant-w4a16-gptq", {}),
    "w4a4kv4-rtn": ("flatquant-w4a4kv4", {}),
    "w4a4kv8-rtn": ("flatquant-w4a4kv8", {}),
    "w4a4-rtn-s2": ("flatquant-w4a4", {"shards": 2}),
    "w4a4-rtn-s4": ("flatquant-w4a4", {"shards": 4}),
    "w4a4-rtn-s8": ("flatquant-w4a4", {"shards": 8}),
}
"""Names of rows from before there were recipes: recipe and changes."""
UNQUANTIZED = "unquantized"
LEFT_OUT = ("kv8", "w4a8", "-g128")
"""Variants of recipes that ``comparison`` leaves to whoever asks for them."""


FAR = 1.25
"""In the plot, times the unquantized perplexity: what is beyond lies at the edge."""


def expand(configs: list[str]) -> list[str]:
    """``comparison`` becomes the recipes that it stands for."""
    comparison = [name for name in RECIPES if not any(part in name for part in LEFT_OUT)]
    return [name for c in configs for name in (comparison if c == "comparison" else [c])]


def recipe_of(config: str, common: dict) -> tuple[dict, Recipe]:
    """The settings that a row keeps, and the recipe, of a configuration. UserError if it is unknown."""
    base, _, extra = config.partition(":")
    changes = {k: json.loads(v) for k, v in (p.split("=", 1) for p in extra.split(",") if p)}
    name, older = OLDER.get(base, (base, {}))
    given = {**common, **older, **changes}
    recipe = choose_recipe(name, **given).recipe
    kept = {"recipe": name, **given, "epochs": recipe.epochs}
    return kept, recipe


def machine(device: torch.device) -> dict[str, str]:
    """Columns that say where a row was measured."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "version": __version__,
    }


def run(job: dict) -> list[dict]:
    """One configuration and seed (or the unquantized model): a row per text."""
    device = choose_device(job["device"])
    torch.set_num_threads(job["threads"])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model, peak = job["model"], None
        if job["settings"] is not None:
            recipe = job["recipe"].model_copy(update={"seed": job["seed"]})
            model = str(quantize(model, Path(folder) / "out", recipe, job["calib"], job["device"]))
            log = (Path(model) / "calibration_log.jsonl").read_text().splitlines()
            peak = max(json.loads(line).get("peak_memory_gb", 0.0) for line in log)
        seconds = time.monotonic() - start
        network = load_reference(model, device)
        about = {
            "model": Path(job["model"]).name,
            "config": job["config"],
            "seed": job["seed"],
            "seq_len": job["seq_len"],
            "settings": json.dumps(job["settings"]),
            "calib": Path(job["calib"]).name,
            "seconds": f"{seconds:.0f}" if job["alone"] else "",
            **machine(device),
            "commit": job["commit"],
        }
        rows = judge(network, job["model"], job["texts"], job["seq_len"])
        used = f"{peak_memory(device) if peak is None else peak:.2f}"
    return [{**about, **row, "peak_memory_gb": used} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument(
        "--config",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help=f"a recipe, comparison [the default], or {', '.join(OLDER)}",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's, where it trains at all")
    parser.add_argument("--limit", type=int, help="windows of each text")
    parser.add_argument("--first", type=int, help="a row for so many first windows of each text as well")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="at a time, on one device")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop then, with the rows so far"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="perplexity of each configuration")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds

    name, calib = Path(args.model).name, Path(args.calib).name
    done = set()
    if args.out.exists():
        with args.out.open() as f:
            same = ("text", "windows", "config", "seed", "calib")
            rows = [r for r in csv.DictReader(f) if r["model"] == name]
            done = {tuple(r[k] for k in same) for r in rows}
            done |= {(*key[:4], calib) for key in done if key[2] == UNQUANTIZED}
    texts = [(t.partition("=")[0], t.partition("=")[2]) for t in args.text]
    counts = window_counts(args.model, texts, args.seq_len, args.limit, args.first)

    calibration = {"samples": args.samples, "seq_len": args.seq_len}
    recipes = {}
    for config in expand(args.config or ["comparison"]):
        try:
            settings, recipe = recipe_of(config, calibration)
            if args.epochs is not None and recipe.epochs:
                settings, recipe = recipe_of(config, {**calibration, "epochs": args.epochs})
        except (UserError, ValueError) as error:
            parser.error(f"--config {config}: {error}")
        recipes[config] = settings, recipe

    common = {
        "stage": run,
        "model": args.model,
        "calib": args.calib,
        "seq_len": args.seq_len,
        "device": args.device,
        "commit": commit(),
        "threads": max(1, (os.cpu_count() or 1) // args.jobs),
        "alone": args.jobs == 1,
    }
    jobs = []
    for seed in range(args.seeds):
        given = {UNQUANTIZED: (None, None)} if seed == 0 else {}
        for config, (settings, recipe) in {**given, **recipes}.items():
            left = left_of(texts, counts, done, config, str(seed), calib)
            if left:
                job = {"config": config, "seed": seed, "settings": settings, "recipe": recipe}
                jobs.append({**common, **job, "texts": left})
    failed = measure(jobs, args.jobs, deadline, args.out)
    if args.plot:
        with args.out.open(newline="") as f:
            rows = [r for r in csv.DictReader(f) if r["model"] == name and r["text"] in counts]
            rows = [r for r in rows if r["calib"] == calib or r["config"] == UNQUANTIZED]
        plot(rows, args.plot)
    return int(failed)


def measure(jobs: list[dict], workers: int, deadline: float, out: Path) -> bool:
    """Run the jobs and append their rows to ``out`` as they come; whether one failed."""
    failed = False
    with appended(out, FIELDS) as append:
        for job, rows, error in run_jobs(jobs, workers, deadline):
            failed |= error is not None
            if error is not None:
                print("FAILED", job["config"], job["seed"], error, flush=True)
                continue
            append(rows)
            for row in rows:
                print(*(row[k] for k in [*FIELDS[:5], "seconds"]), flush=True)
    for job in jobs:
        print("not done:", job["config"], job["seed"])
    return failed


def plot(rows: list[dict[str, str]], file: Path) -> None:
    """Dots of perplexity, mean over seeds, a line for each configuration (best first, by all texts) and a panel for
    each text, its unquantized perplexity as a dashed line. Colours: bits of activations. What is far off lies at the
    edge with its figure. rows: of the CSV, one model's."""
    from matplotlib import pyplot

    texts = sorted({row["text"] for row in rows})
    most = {t: max(int(row["windows"]) for row in rows if row["text"] == t) for t in texts}
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if int(row["windows"]) == most[row["text"]]:
            by_text = found.setdefault(row["config"], {})
            by_text.setdefault(row["text"], []).append(float(row["perplexity"]))
    original = found.pop(UNQUANTIZED, {})
    configs = sorted(found, key=lambda c: -mean(math.log(mean(v)) for v in found[c].values()))
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=(2 + 3 * len(texts), 1 + 0.25 * len(configs)), squeeze=False, sharey=True
    )
    bits = {c: recipe_of(c, {})[1].activation_bits for c in configs}
    colours = dict(
        zip(sorted(set(bits.values())), ("tab:blue", "tab:orange", "tab:green"), strict=False)
    )
    for text, axes in zip(texts, panels[0], strict=True):
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
        axes.set_title(f"{text} ({most[text]} windows)", fontsize=9)
        axes.set_xlabel("perplexity")
        axes.grid(axis="y", color="0.9")
    panels[0][0].legend(title="activations", fontsize=8, title_fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
