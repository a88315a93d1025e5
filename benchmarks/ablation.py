"""Variants of the calibration, on validation text: one row per variant, seed and text.

    python benchmarks/ablation.py --model DIR --calib FILE.npy --text wikitext2-valid=FILE.npy \
        --variant 'w4a4;distill_epochs=10' --variant 'w4a4,rounding="gptq";distill_epochs=10,distill_lr=2e-3'

A variant is ``BLOCKS;LAST``: settings of the recipe for the stage block by block, then for the end-to-end stage
(empty: none). Variants with equal BLOCKS share that stage, which runs once; both stages run ``--jobs`` at a time on
one device. BLOCKS may begin with a scheme. Rows go to benchmarks/results/ablation.csv; rows that are there already
are not measured again.
"""

import argparse
import csv
import json
import multiprocessing as mp
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from accuracy import commit, machine, read_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_flatquant.calibration.data import calibration_tokens
from vllm_flatquant.calibration.endtoend import LATENT, distill
from vllm_flatquant.calibration.evaluate import perplexity, windows
from vllm_flatquant.calibration.export import CheckpointWriter
from vllm_flatquant.calibration.quantize import (
    choose_device,
    make_spec,
    peak_memory,
    quantize_block,
    stream_device,
)
from vllm_flatquant.calibration.recipe import Recipe, make_recipe
from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.calibration.source import ModelSource
from vllm_flatquant.calibration.streams import record_inputs

RESULTS = Path(__file__).parent / "results" / "ablation.csv"
FIELDS = [
    "model",
    "text",
    "variant",
    "seed",
    "perplexity",
    "windows",
    "seq_len",
    "calib",
    "samples",
    "epochs",
    "kl_first",
    "kl_last",
    "blocks_seconds",
    "last_seconds",
    "peak_memory_gb",
    "device",
    "torch",
    "transformers",
    "version",
    "commit",
]


def parse(settings: str) -> dict[str, Any]:
    """``w4a4,lr=0.01`` -> recipe settings; values are JSON."""
    found: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        found |= {key: json.loads(value)} if equals else {"scheme": key}
    return found


def start(job: dict[str, Any]) -> torch.device:
    """Threads and products of this process; its device."""
    torch.set_num_threads(job["threads"])
    torch.set_float32_matmul_precision(job["precision"])
    return choose_device(job["device"])


def run_blocks(job: dict[str, Any]) -> float:
    """The stage block by block: saves every block's tensors, with its weights before rounding; seconds."""
    device, begin = start(job), time.monotonic()
    # Any last stage makes quantize_block keep the weights before rounding.
    recipe = make_recipe(**job["blocks"], seed=job["seed"], distill_epochs=1)
    source = ModelSource(job["model"])
    spec = make_spec(source, recipe)
    tokens = calibration_tokens(job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed)
    x, kwargs = record_inputs(source, tokens, device)
    x = x.to(stream_device(x, device))
    x_q = x.clone() if recipe.rounding != "rtn" else x[:1].clone()
    for i in range(source.num_blocks):
        x, x_q, tensors, _ = quantize_block(source, i, recipe, spec, x, x_q, kwargs[i], device)
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, block_file(job, i))
    return time.monotonic() - begin


def block_file(job: dict[str, Any], index: int) -> Path:
    """Where the tensors of a block lie between the stages."""
    return Path(job["folder"]) / f"block-{index}.safetensors"


def run_last(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The end-to-end stage on saved blocks, a checkpoint, and a row per text."""
    device, begin = start(job), time.monotonic()
    recipe = make_recipe(**job["blocks"] | job["last"], seed=job["seed"])
    source = ModelSource(job["model"])
    blocks = [load_file(block_file(job, i)) for i in range(source.num_blocks)]
    others = {n: source.files.tensor(n) for n in source.other_names()}
    kl: tuple[float, float] | tuple[str, str] = ("", "")
    if recipe.distill_epochs:
        tokens = calibration_tokens(
            job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed
        )
        spec = make_spec(source, recipe)
        blocks, changed, report = distill(source, blocks, tokens, recipe, spec, device)
        others, kl = others | changed, (report.kl_first_epoch, report.kl_last_epoch)
    seconds = time.monotonic() - begin
    torch.set_float32_matmul_precision("highest")
    with tempfile.TemporaryDirectory() as folder:
        network = load_reference(write(source, recipe, blocks, others, Path(folder) / "out"), device)
        rows = []
        for text, file in job["texts"]:
            cut = windows(read_tokens(job["model"], file), job["seq_len"], job["limit"])
            rows.append(
                {
                    **job["row"],
                    "text": text,
                    "perplexity": f"{perplexity(network, cut):.4f}",
                    "windows": len(cut),
                    "kl_first": kl[0],
                    "kl_last": kl[1],
                    "blocks_seconds": f"{job['blocks_seconds']:.0f}",
                    "last_seconds": f"{seconds:.0f}",
                    "peak_memory_gb": f"{peak_memory(device):.2f}",
                    **machine(device),
                }
            )
    return rows


def write(
    source: ModelSource,
    recipe: Recipe,
    blocks: list[dict[str, Tensor]],
    others: dict[str, Tensor],
    out: Path,
) -> Path:
    """The checkpoint of these tensors: what is measured is what would be served."""
    with CheckpointWriter(out, overwrite=False) as writer:
        for i, tensors in enumerate(blocks):
            prefix = source.block_prefix(i)
            writer.add({prefix + n: t for n, t in tensors.items() if not n.endswith(LATENT)})
        writer.add(others)
        writer.write_side_files(source.path, source.raw_config, make_spec(source, recipe))
        return writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--variant", action="append", required=True, metavar="BLOCKS;LAST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--precision", choices=["highest", "high"], default="highest")
    parser.add_argument("--keep", type=Path, help="folder where the stage block by block stays")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    texts = [tuple(t.split("=", 1)) for t in args.text]
    counts = {
        t: str(len(windows(read_tokens(args.model, f), args.seq_len, args.limit))) for t, f in texts
    }
    name, calib = Path(args.model).name, Path(args.calib).name
    same = ("model", "text", "variant", "seed", "windows", "calib", "samples", "epochs")
    done = set()
    if args.out.exists():
        with args.out.open() as f:
            done = {tuple(row[k] for k in same) for row in csv.DictReader(f)}

    common = {
        "model": args.model,
        "calib": args.calib,
        "seq_len": args.seq_len,
        "limit": args.limit,
        "device": args.device,
        "precision": args.precision,
        "threads": max(1, mp.cpu_count() // args.jobs),
    }
    about = {
        "model": name,
        "seq_len": args.seq_len,
        "calib": calib,
        "samples": args.samples,
        "epochs": args.epochs,
        "commit": commit(),
    }
    sizes = {"samples": args.samples, "seq_len": args.seq_len, "epochs": args.epochs}
    first: dict[str, dict[str, Any]] = {}
    last: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            for variant in args.variant:
                left = [
                    (t, f)
                    for t, f in texts
                    if (
                        name,
                        t,
                        variant,
                        str(seed),
                        counts[t],
                        calib,
                        str(args.samples),
                        str(args.epochs),
                    )
                    not in done
                ]
                if not left:
                    continue
                blocks, _, end = variant.partition(";")
                key = f"{name}-{blocks}-{seed}-{'-'.join(map(str, sizes.values()))}".replace("/", "_")
                folder = (args.keep or Path(temporary)) / key
                settings = {**common, "blocks": {**sizes, **parse(blocks)}, "seed": seed}
                settings |= {"folder": str(folder)}
                first.setdefault(str(folder), settings)
                row = {**about, "variant": variant, "seed": seed}
                last.append({**settings, "last": parse(end), "texts": left, "row": row})
        # Everything that can be wrong with a setting is found before hours of work.
        for job in last:
            make_recipe(**job["blocks"] | job["last"], seed=job["seed"])
        context = mp.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            measure(pool, first, last, args.out)


def measure(pool: ProcessPoolExecutor, first: dict[str, dict], last: list[dict], out: Path) -> None:
    """Run both stages; a last stage starts as soon as its blocks are there. Rows are appended to ``out``."""
    pending: dict[Future, dict | None] = {}  # a stage block by block, or None for a last stage

    def follow(folder: str) -> None:
        seconds = float((Path(folder) / "seconds").read_text())
        for job in last:
            if job["folder"] == folder:
                pending[pool.submit(run_last, {**job, "blocks_seconds": seconds})] = None

    for folder, job in first.items():
        if (Path(folder) / "seconds").exists():
            follow(folder)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            pending[pool.submit(run_blocks, job)] = job
    out.parent.mkdir(exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        if fresh:
            writer.writeheader()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                if job is not None:
                    seconds = future.result()
                    (Path(job["folder"]) / "seconds").write_text(str(seconds))
                    print(f"blocks {Path(job['folder']).name} {seconds:.0f} s", flush=True)
                    follow(job["folder"])
                    continue
                rows = future.result()
                writer.writerows(rows)
                f.flush()
                for row in rows:
                    print(*(row[k] for k in FIELDS[:5]), row["last_seconds"], flush=True)


if __name__ == "__main__":
    main()
