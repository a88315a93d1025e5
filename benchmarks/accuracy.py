"""Perplexity of quantized models: one row per configuration, seed and text. `make compare` runs it.

    python benchmarks/accuracy.py --model DIR --calib FILE.npy --text wikitext2=FILE.npy \
        --text python=FILE.txt --seeds 3 --table comparison.md --plot comparison.png

A configuration is a recipe (``flatquant recipes`` lists them; a YAML file does too), ``comparison`` (each system's at
each of its bits), ``all``, or a name of the table's older rows, each with changes behind a colon: ``quarot-w4a4:kv=8``.
All calibrate on the same tokens (rows of another --calib are rows of their own). Rows go to
benchmarks/results/accuracy.csv as they come, with seconds, peak memory and how many jobs shared the device (--jobs);
a row that is there already (same model, text, windows, configuration, seed, calibration text and size) is not run again.
Seeds are the outer loop. A job that fails is reported and the others go on. ``--table`` and ``--plot`` show what the
CSV has of this model, these texts and this calibration.
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
from typing import Any

import torch
import transformers
from accuracy_tables import UNQUANTIZED, Rows, plot, table
from judging import FLATNESS, appended, judge, left_of, window_counts
from timing import commit
from workers import run_jobs

from vllm_flatquant import __version__
from vllm_flatquant.calibration.data import calibration_tokens, check_vocabulary
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.meter import peak_memory
from vllm_flatquant.calibration.quantize import choose_device, quantize
from vllm_flatquant.calibration.recipe import PRESETS, Recipe
from vllm_flatquant.calibration.recipes import RECIPES, choose_recipe, preset_settings
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.calibration.source import ModelSource, check_context

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
    "jobs",
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
LEFT_OUT = ("kv8", "w4a8-gptq", "-g128")
"""Variants of recipes that ``comparison`` leaves to ``all``."""
SIZE = ("samples", "seq_len", "epochs")
"""Settings that decide whether two rows are of the same measurement."""


def expand(configs: list[str]) -> list[str]:
    """``comparison`` and ``all`` become the recipes that they stand for."""
    comparison = [name for name in RECIPES if not any(part in name for part in LEFT_OUT)]
    groups = {"comparison": comparison, "all": list(RECIPES)}
    return [name for c in configs for name in groups.get(c, [c])]


def recipe_of(config: str, common: dict, preset: str = "default") -> tuple[dict, Recipe]:
    """The settings that a row keeps, and the recipe, of a configuration. UserError if it is unknown."""
    base, _, extra = config.partition(":")
    changes = {}
    for part in filter(None, extra.split(",")):
        key, given_value, value = part.partition("=")
        if not given_value:
            raise UserError(f"'{part}' changes nothing; write SETTING=VALUE, such as kv=8")
        try:
            changes[key] = json.loads(value)
        except ValueError:  # a word
            changes[key] = value
    name, older = OLDER.get(base, (base, {}))
    given = {**preset_settings(preset, name), **common, **older, **changes}
    recipe = choose_recipe(name, **given).recipe
    kept = {"recipe": name, **given, "epochs": recipe.epochs, "scheme": recipe.scheme, "kv": recipe.kv}
    return kept, recipe


def size_of(settings: dict[str, Any] | None) -> tuple[Any, ...]:
    """The values of ``SIZE``; nothing for the unquantized model."""
    return tuple(settings[name] for name in SIZE) if settings else ()


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
            "model": job["name"],
            "config": job["config"],
            "seed": job["seed"],
            "seq_len": job["seq_len"],
            "settings": json.dumps(job["settings"]),
            "calib": Path(job["calib"]).name,
            "seconds": f"{seconds:.0f}",
            "jobs": job["jobs"],
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
        help=f"a recipe, comparison [the default], all, or {', '.join(OLDER)}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help="quick: reduced")
    parser.add_argument("--samples", type=int, help="calibration rows [128, or the preset's]")
    parser.add_argument("--seq-len", type=int, help="of all rows and windows [1024, or the preset's]")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's, where it trains at all")
    parser.add_argument("--limit", type=int, help="windows of each text")
    parser.add_argument("--first", type=int, help="a row for so many first windows of each text as well")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="at a time, on one device")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop then, with the rows so far"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, metavar="MD", help="a line for each configuration")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="perplexity of each configuration")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds

    name, calib = Path(args.model).name, Path(args.calib).name
    sizes = {"samples": 128, "seq_len": 1024, **PRESETS[args.preset]}
    seq_len = args.seq_len or sizes["seq_len"]
    calibration = {"samples": args.samples or sizes["samples"], "seq_len": seq_len}
    recipes = {}
    for config in expand(args.config or ["comparison"]):
        try:
            settings, recipe = recipe_of(config, calibration, args.preset)
            if args.epochs is not None and recipe.epochs:
                changed = {**calibration, "epochs": args.epochs}
                settings, recipe = recipe_of(config, changed, args.preset)
        except (UserError, ValueError) as error:
            parser.error(f"--config {config}: {error}")
        recipes[config] = settings, recipe
    texts = [(t.partition("=")[0], t.partition("=")[2]) for t in args.text]
    if not all(file for _, file in texts):
        parser.error("--text takes NAME=FILE, such as heldout=examples/heldout.txt")
    try:
        source = ModelSource(args.model)
        check_context(source.config, seq_len)
        model = str(source.path)
        counts = window_counts(model, texts, seq_len, args.limit, args.first)
        rows_read = calibration_tokens(args.calib, source.path, calibration["samples"], seq_len, 0)
        check_vocabulary(rows_read, source.config.vocab_size)
    except UserError as error:
        parser.error(str(error))
    done = {key_of(row) for row in read_rows(args.out, name, calib, seq_len)}

    common = {
        "stage": run,
        "model": model,
        "name": name,
        "calib": args.calib,
        "seq_len": seq_len,
        "device": args.device,
        "commit": commit(),
        "threads": max(1, (os.cpu_count() or 1) // args.jobs),
        "jobs": args.jobs,
    }
    jobs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        given = {UNQUANTIZED: (None, None)} if seed == 0 else {}
        for config, (settings, recipe) in {**given, **recipes}.items():
            left = left_of(texts, counts, done, config, str(seed), size_of(settings))
            if left:
                job = {"config": config, "seed": seed, "settings": settings, "recipe": recipe}
                jobs.append({**common, **job, "texts": left})
    for file in filter(None, (args.table, args.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    status = measure(jobs, args.jobs, deadline, args.out)
    rows = [r for r in read_rows(args.out, name, calib, seq_len) if r["text"] in counts]
    rows = [r for r in rows if shown(r, {c: size_of(settings) for c, (settings, _) in recipes.items()})]
    if rows and args.table:
        args.table.write_text(table(rows), encoding="utf-8")
        print(args.table.read_text(encoding="utf-8"))
    if rows and args.plot:
        plot(rows, args.plot)
    return status


def read_rows(file: Path, model: str, calib: str, seq_len: int) -> Rows:
    """The rows of a CSV of this model and calibration text, in windows of ``seq_len``; none if there is no file."""
    if not file.exists():
        return []
    with file.open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if (r["model"], r["seq_len"]) == (model, str(seq_len))]
    return [r for r in rows if r["calib"] == calib or r["config"] == UNQUANTIZED]


def shown(row: dict[str, str], sizes: dict[str, tuple[Any, ...]]) -> bool:
    """Whether a row belongs beside configurations of these ``SIZE``: one of theirs has its epochs too, or a line would
    be the mean of two lengths of training."""
    size, config = key_of(row)[-1], row["config"]
    if config in sizes:
        return size == sizes[config]
    return config == UNQUANTIZED or size[:2] in {other[:2] for other in sizes.values()}


def key_of(row: dict[str, str]) -> tuple[Any, ...]:
    """What makes a row of ``read_rows`` the same measurement as another."""
    size = size_of(json.loads(row["settings"]))
    return row["text"], row["windows"], row["config"], row["seed"], size


def measure(jobs: list[dict], workers: int, deadline: float, out: Path) -> int:
    """Run the jobs and append their rows to ``out`` as they come. Returns the script's status: 1 if one failed, 130
    after Ctrl-C."""
    status = 0
    try:
        with appended(out, FIELDS) as append:
            for job, rows, error in run_jobs(jobs, workers, deadline):
                if error is not None:
                    status = 1
                    print("FAILED", job["config"], job["seed"], error, flush=True)
                    continue
                append(rows)
                for row in rows:
                    print(*(row[k] for k in [*FIELDS[:5], "seconds"]), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; {out} keeps the rows so far, and the same command goes on")
        return 130
    for job in jobs:
        print("not done:", job["config"], job["seed"])
    return status


if __name__ == "__main__":
    sys.exit(main())
