"""Perplexity of quantized models: one row per configuration, seed and text.

    python benchmarks/accuracy.py --model DIR --calib FILE.npy --text wikitext2=FILE.npy \
        --text python=FILE.txt --config w4a4-rtn --config w4a4-gptq --seeds 3

Rows go to benchmarks/results/accuracy.csv; a row that is there already (same model, text, configuration
and seed) is not run again. Each run repeats the unquantized baseline. Several jobs can share one GPU.
"""

import argparse
import csv
import json
import multiprocessing as mp
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import transformers

from vllm_flatquant import __version__
from vllm_flatquant.calibration.data import evaluation_tokens
from vllm_flatquant.calibration.evaluate import perplexity, windows
from vllm_flatquant.calibration.meter import peak_memory
from vllm_flatquant.calibration.quantize import choose_device, quantize
from vllm_flatquant.calibration.recipe import make_recipe
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
CONFIGS: dict[str, dict] = {
    "w4a4-rtn": {"scheme": "w4a4"},
    "w4a4-gptq": {"scheme": "w4a4", "rounding": "gptq"},
    "w4a8-rtn": {"scheme": "w4a8"},
    "w4a16-rtn": {"scheme": "w4a16"},
    "w4a16-gptq": {"scheme": "w4a16", "rounding": "gptq"},
    "w4a4kv4-rtn": {"scheme": "w4a4", "kv": 4},
    "w4a4kv8-rtn": {"scheme": "w4a4", "kv": 8},
    "w4a4-rtn-s2": {"scheme": "w4a4", "shards": 2},
    "w4a4-rtn-s4": {"scheme": "w4a4", "shards": 4},
    "w4a4-rtn-s8": {"scheme": "w4a4", "shards": 8},
}


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


def commit() -> str:
    """The commit whose code runs: asked once, at the start, because the tree may move on meanwhile."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True
    )
    return git.stdout.strip() or os.environ.get("COMMIT", "unknown")


def run(job: dict) -> list[dict]:
    """One configuration and seed (or the unquantized model): a row per text."""
    device = choose_device(job["device"])
    torch.set_num_threads(job["threads"])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = job["model"]
        if job["settings"] is not None:
            recipe = make_recipe(**job["settings"], seed=job["seed"])
            model = str(quantize(model, Path(folder) / "out", recipe, job["calib"], job["device"]))
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
                    "perplexity": f"{perplexity(network, cut):.4f}",
                    "windows": len(cut),
                    "seq_len": job["seq_len"],
                    "settings": json.dumps(job["settings"]),
                    "calib": Path(job["calib"]).name,
                    "seconds": f"{seconds:.0f}",
                    "peak_memory_gb": f"{peak_memory(device):.2f}",
                    **machine(device),
                    "commit": job["commit"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument(
        "--config", action="append", help=f"name[:key=value,...]; names: {', '.join(CONFIGS)}"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    done = set()
    if args.out.exists():
        with args.out.open() as f:
            done = {
                (r["model"], r["text"], r["config"], r["seed"], r["windows"]) for r in csv.DictReader(f)
            }
    texts = [tuple(t.split("=", 1)) for t in args.text]
    counts = {t: len(windows(read_tokens(args.model, f), args.seq_len, args.limit)) for t, f in texts}
    name = Path(args.model).name

    def settings_of(config: str) -> dict:
        base, _, extra = config.partition(":")
        common = {"samples": args.samples, "seq_len": args.seq_len, "epochs": args.epochs}
        pairs = (p.split("=", 1) for p in extra.split(",") if p)
        return {**common, **CONFIGS[base], **{k: json.loads(v) for k, v in pairs}}

    common = {
        "model": args.model,
        "calib": args.calib,
        "seq_len": args.seq_len,
        "limit": args.limit,
        "device": args.device,
        "commit": commit(),
        "threads": max(1, mp.cpu_count() // args.jobs),
    }
    jobs = [{**common, "config": "unquantized", "seed": 0, "settings": None, "texts": texts}]
    for seed in range(args.seeds):
        for config in args.config or CONFIGS:
            left = [(t, f) for t, f in texts if (name, t, config, str(seed), str(counts[t])) not in done]
            if left:
                settings = settings_of(config)
                jobs.append(
                    {**common, "config": config, "seed": seed, "settings": settings, "texts": left}
                )
    args.out.parent.mkdir(exist_ok=True)
    fresh = not args.out.exists()
    with args.out.open("a", newline="") as f, mp.get_context("spawn").Pool(args.jobs) as pool:
        writer = csv.DictWriter(f, FIELDS)
        if fresh:
            writer.writeheader()
        for rows in pool.imap_unordered(run, jobs):
            for row in rows:
                if (
                    row["model"],
                    row["text"],
                    row["config"],
                    str(row["seed"]),
                    str(row["windows"]),
                ) not in done:
                    writer.writerow(row)
                print(
                    row["model"],
                    row["text"],
                    row["config"],
                    row["seed"],
                    row["perplexity"],
                    row["seconds"],
                    flush=True,
                )
            f.flush()


if __name__ == "__main__":
    main()
