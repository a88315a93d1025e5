"""Perplexity of quantized models: one row per configuration, seed and text.

    python benchmarks/accuracy.py --model DIR --calib FILE.npy --text wikitext2=FILE.npy \
        --text python=FILE.txt --config comparison --seeds 3 --plot comparison.png

A configuration is a recipe (``flatquant recipes`` lists them; a YAML file does too), ``comparison`` (one of each
system), or a name of the table's older rows, each with changes behind a colon: ``quarot-w4a4:kv=8,shards=2``.
All calibrate on the same tokens. Rows go to benchmarks/results/accuracy.csv as they come, with seconds and peak
memory; a row that is there already (same model, text, configuration and seed) is not run again. Seeds are the
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
from timing import commit
from workers import run_jobs

from vllm_flatquant import __version__
from vllm_flatquant.calibration.data import evaluation_tokens
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.evaluate import perplexity, windows
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
EVAL_BATCH = 8
LEFT_OUT = ("kv8", "w4a8", "-g128")
"""Variants of recipes that ``comparison`` leaves to whoever asks for them."""


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


def read_tokens(model: str, file: str) -> torch.Tensor:
    """Token ids int64 [n] of a .npy file, or of a text in the model's tokenizer."""
    source = {"tokens": file} if file.endswith(".npy") else {"text": file}
    return evaluation_tokens(Path(model), **{"text": None, "tokens": None, "dataset": None, **source})


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
        rows = []
        for text, file in job["texts"]:
            cut = windows(read_tokens(job["model"], file), job["seq_len"], job["limit"])
            rows.append(
                {
                    "model": Path(job["model"]).name,
                    "text": text,
                    "config": job["config"],
                    "seed": job["seed"],
                    "perplexity": f"{perplexity(network, cut, EVAL_BATCH):.4f}",
                    "windows": len(cut),
                    "seq_len": job["seq_len"],
                    "settings": json.dumps(job["settings"]),
                    "calib": Path(job["calib"]).name,
                    "seconds": f"{seconds:.0f}" if job["alone"] else "",
                    "peak_memory_gb": f"{peak_memory(device) if peak is None else peak:.2f}",
                    **machine(device),
                    "commit": job["commit"],
                }
            )
    return rows


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
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="at a time, on one device")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop then, with the rows so far"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="perplexity of each configuration")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds

    done = set()
    if args.out.exists():
        with args.out.open() as f:
            done = {
                (r["model"], r["text"], r["config"], r["seed"], r["windows"]) for r in csv.DictReader(f)
            }
    texts = [tuple(t.split("=", 1)) for t in args.text]
    counts = {t: len(windows(read_tokens(args.model, f), args.seq_len, args.limit)) for t, f in texts}
    name = Path(args.model).name

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
        "limit": args.limit,
        "device": args.device,
        "commit": commit(),
        "threads": max(1, (os.cpu_count() or 1) // args.jobs),
        "alone": args.jobs == 1,
    }
    jobs = []
    for seed in range(args.seeds):
        given = {"unquantized": (None, None)} if seed == 0 else {}
        for config, (settings, recipe) in {**given, **recipes}.items():
            left = [(t, f) for t, f in texts if (name, t, config, str(seed), str(counts[t])) not in done]
            if left:
                job = {"config": config, "seed": seed, "settings": settings, "recipe": recipe}
                jobs.append({**common, **job, "texts": left})
    failed = measure(jobs, args.jobs, deadline, args.out)
    if args.plot:
        with args.out.open(newline="") as f:
            rows = [r for r in csv.DictReader(f) if r["model"] == name and r["text"] in counts]
        plot(rows, args.plot)
    return int(failed)


def measure(jobs: list[dict], workers: int, deadline: float, out: Path) -> bool:
    """Run the jobs and append their rows to ``out`` as they come; whether one failed."""
    failed = False
    out.parent.mkdir(exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        if fresh:
            writer.writeheader()
        for job, rows, error in run_jobs(jobs, workers, deadline):
            failed |= error is not None
            if error is not None:
                print("FAILED", job["config"], job["seed"], error, flush=True)
                continue
            writer.writerows(rows)
            f.flush()
            for row in rows:
                print(*(row[k] for k in [*FIELDS[:5], "seconds"]), flush=True)
    for job in jobs:
        print("not done:", job["config"], job["seed"])
    return failed


def plot(rows: list[dict[str, str]], file: Path) -> None:
    """Dots of perplexity, mean over seeds, a line for each configuration (best first, by all texts) and a panel for
    each text, its unquantized perplexity as a dashed line. rows: of the CSV, one model's."""
    from matplotlib import pyplot

    texts = sorted({row["text"] for row in rows})
    most = {t: max(int(row["windows"]) for row in rows if row["text"] == t) for t in texts}
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if int(row["windows"]) == most[row["text"]]:
            by_text = found.setdefault(row["config"], {})
            by_text.setdefault(row["text"], []).append(float(row["perplexity"]))
    original = found.pop("unquantized", {})
    configs = sorted(found, key=lambda c: -mean(math.log(mean(v)) for v in found[c].values()))
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=(2 + 3 * len(texts), 1 + 0.25 * len(configs)), squeeze=False, sharey=True
    )
    for text, axes in zip(texts, panels[0], strict=True):
        here = [c for c in configs if text in found[c]]
        axes.plot([mean(found[c][text]) for c in here], [configs.index(c) for c in here], "o")
        if text in original:
            axes.axvline(mean(original[text]), color="0.6", linestyle="--")
        axes.set_yticks(range(len(configs)), configs)
        axes.set_title(f"{text} ({most[text]} windows)", fontsize=9)
        axes.set_xlabel("perplexity")
        axes.grid(axis="y", color="0.9")
    figure.tight_layout()
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
