"""Variants of the calibration, on validation text: one row per variant, seed and text.

    python benchmarks/ablation.py --model DIR --calib FILE.npy --text wikitext2-valid=FILE.npy \
        --variant 'w4a4;distill_epochs=10' --variant 'w4a4,rounding="gptq";distill_epochs=10,distill_lr=2e-3'

A variant is ``BLOCKS;LAST``: settings of the recipe for the stage block by block, then for the end-to-end stage
(empty: none); --variants takes a file of them, most wanted first. Variants with equal BLOCKS share that stage,
which runs once; ``--jobs`` stages run at a time on one device (rows being written have it to themselves). BLOCKS may begin with a scheme. Rows go to
benchmarks/results/ablation.csv as they come; rows that are there already are not measured again. ``BLOCKS;best``
stands for the end-to-end settings that did best so far with the first variant's BLOCKS, by --choose; settings behind
``best,`` are changes to them.
"""

import argparse
import csv
import gc
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accuracy import commit, machine
from judging import FLATNESS, appended, judge, left_of, window_counts
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers import run_jobs

from vllm_flatquant.calibration.data import calibration_tokens
from vllm_flatquant.calibration.endtoend import LATENT, distill, generated_tokens
from vllm_flatquant.calibration.meter import peak_memory, reset_peaks
from vllm_flatquant.calibration.quantize import (
    choose_device,
    make_spec,
    stream_device,
)
from vllm_flatquant.calibration.quantize_block import quantize_block
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import install_block
from vllm_flatquant.calibration.source import ModelSource, meta_model
from vllm_flatquant.calibration.streams import record_inputs
from vllm_flatquant.spec import FlatQuantSpec

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
    "kl_held_before",
    "kl_held_after",
    "blocks_seconds",
    "last_seconds",
    "written_seconds",
    "jobs",
    "peak_memory_gb",
    "device",
    "torch",
    "transformers",
    "version",
    "commit",
    *FLATNESS,
]
KL = ("kl_first", "kl_last", "kl_held_before", "kl_held_after")
KL_TEXT = "kl"
"""For --choose: the divergence of held-out rows in place of a text."""
GENERATED = "tokens.safetensors"
BEST = "best"


def parse(settings: str) -> dict[str, Any]:
    """``w4a4,lr=0.01`` -> recipe settings; values are JSON."""
    found: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        found |= {key: json.loads(value)} if equals else {"scheme": key}
    return found


def start(job: dict[str, Any]) -> torch.device:
    """Sets this process's threads; its device."""
    torch.set_num_threads(job["threads"])
    device = choose_device(job["device"])
    if device.type == "cuda":  # what the job before left; others share the device
        gc.collect()
        torch.cuda.empty_cache()
    reset_peaks(device)
    return device


def run_blocks(job: dict[str, Any]) -> float:
    """The stage block by block: saves every block's tensors, with its weights before rounding; seconds."""
    device, begin = start(job), time.monotonic()
    job["folder"].mkdir(parents=True, exist_ok=True)
    # Any last stage makes quantize_block keep the weights before rounding.
    recipe = make_recipe(**job["blocks"], seed=job["seed"], distill_epochs=1)
    source = ModelSource(job["model"])
    spec = make_spec(source, recipe)
    tokens = calibration_tokens(job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed)
    x, kwargs = record_inputs(source, tokens, device)
    x_q = x = x.to(stream_device(recipe, source, device))
    for i in range(source.num_blocks):
        x, x_q, tensors, _ = quantize_block(source, i, recipe, spec, x, x_q, kwargs[i], device)
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, block_file(job, i))
    return time.monotonic() - begin


def block_file(job: dict[str, Any], index: int) -> Path:
    """Where the tensors of a block lie between the stages."""
    return job["folder"] / f"block-{index}.safetensors"


def run_generation(job: dict[str, Any]) -> float:
    """Saves the rows that the model writes (for the first seed; the others, and variants with fewer, use them too);
    seconds."""
    device, begin = start(job), time.monotonic()
    source = ModelSource(job["model"])
    recipe = make_recipe(**job["blocks"], seed=job["seed"])
    tokens = calibration_tokens(job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed)
    more = generated_tokens(source, tokens, job["rows"], recipe.seed, device)
    job["folder"].mkdir(parents=True, exist_ok=True)
    save_file({"tokens": more}, job["folder"] / GENERATED)
    return time.monotonic() - begin


def run_last(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The end-to-end stage on saved blocks, a checkpoint, and a row per text."""
    device, begin = start(job), time.monotonic()
    recipe = make_recipe(**job["blocks"] | job["last"], seed=job["seed"])
    source = ModelSource(job["model"])
    spec = make_spec(source, recipe)
    blocks = [load_file(block_file(job, i)) for i in range(source.num_blocks)]
    others = {n: source.files.tensor(n) for n in source.other_names()}
    kl: tuple[float | str, ...] = ("", "", "", "")
    written = ""
    if recipe.distill_epochs:
        tokens = calibration_tokens(
            job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed
        )
        if recipe.distill_generated:
            more = load_file(job["needs"][1] / GENERATED)["tokens"]
            written = (job["needs"][1] / "seconds").read_text()
            tokens = torch.cat([tokens, more[: recipe.distill_generated]])
        blocks, changed, report = distill(source, blocks, tokens, recipe, spec, device)
        others |= changed  # also where quantize would undo it
        held = report.kl_held_out_before, report.kl_held_out_after
        kl = (report.kl_first_epoch, report.kl_last_epoch, *held)
    seconds = time.monotonic() - begin
    network = assemble(source, spec, blocks, others, device)
    about = {
        **job["row"],
        **dict(zip(KL, kl, strict=True)),
        "blocks_seconds": (job["folder"] / "seconds").read_text(),
        "last_seconds": f"{seconds:.0f}",
        "written_seconds": written,
        **machine(device),
    }
    rows = judge(network, job["model"], job["texts"], job["blocks"]["seq_len"])
    return [{**about, **row, "peak_memory_gb": f"{peak_memory(device):.2f}"} for row in rows]


def assemble(
    source: ModelSource,
    spec: FlatQuantSpec,
    blocks: list[dict[str, Tensor]],
    others: dict[str, Tensor],
    device: torch.device,
) -> Any:
    """The model that a checkpoint of these tensors holds, on the references in float32."""
    network: Any = meta_model(source.config)
    network.to(torch.float32)
    for i, (layer, tensors) in enumerate(
        zip(network.get_submodule(source.arch.blocks), blocks, strict=True)
    ):
        own = {n: t.to(device) for n, t in tensors.items() if not n.endswith(LATENT)}
        plain = {n: t for n, t in source.block_tensors(i).items() if n in own}
        layer.load_state_dict(plain, assign=True, strict=False)
        install_block(layer, own, spec, source.arch)
    network.load_state_dict(others, assign=True, strict=False)
    if source.config.tie_word_embeddings:
        network.tie_weights()
    return network.to(device, torch.float32).eval()


def read_variants(files: list[Path]) -> list[str]:
    """The lines of the files that are neither empty nor comments."""
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--variant", action="append", default=[], metavar="BLOCKS;LAST")
    parser.add_argument(
        "--variants", type=Path, action="append", default=[], help="file with a variant on each line"
    )
    parser.add_argument(
        "--once",
        type=Path,
        action="append",
        default=[],
        help="as --variants, after them, first seed only",
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop then, with the rows so far"
    )
    parser.add_argument("--choose", action="append", help="text, or kl, that decides the order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int, help="windows of each text")
    parser.add_argument("--first", type=int, help="a row for so many first windows of each text as well")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder where the stage block by block stays")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    args.variant += read_variants(args.variants)
    args.once = read_variants(args.once)
    args.choose = args.choose or [t.partition("=")[0] for t in args.text]
    if not args.variant:
        parser.error("give --variant or --variants")
    with tempfile.TemporaryDirectory() as temporary:
        jobs = plan(args, args.keep or Path(temporary))
        failed = measure(jobs, args.jobs, deadline, args.out)
    means = read_means(args.out)
    for variant in ranked(means, args.choose):
        print(variant, *(f"{t}={mean(p):.4f} ({len(p)})" for t, p in means[variant].items()))
    return int(failed)


def plan(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The jobs that are left, most wanted first; those whose stage lies in ``folder`` are not repeated."""
    texts = [(t.partition("=")[0], t.partition("=")[2]) for t in args.text]
    counts = window_counts(args.model, texts, args.seq_len, args.limit, args.first)
    sizes = {"samples": args.samples, "seq_len": args.seq_len, "epochs": args.epochs}
    about = {"model": Path(args.model).name, "calib": Path(args.calib).name, **sizes}
    same = ("text", "windows", "variant", "seed", *about)
    done = set()
    if args.out.exists():
        with args.out.open() as f:
            done = {tuple(row[k] for k in same) for row in csv.DictReader(f)}
    common = {
        "model": args.model,
        "calib": args.calib,
        "device": args.device,
        "threads": max(1, (os.cpu_count() or 1) // args.jobs),
    }
    code = commit()
    pairs = [(s, v) for s in args.seeds for v in args.variant]
    pairs += [(args.seeds[0], v) for v in args.once]
    pairs = [(s, best_for(v, pairs[0][1], args.out, args.choose)) for s, v in pairs]
    rows = max(parse(v.partition(";")[2]).get("distill_generated", 0) for _, v in pairs)
    stem = f"{about['model']}-{args.seq_len}-generated-"
    there = [int(f.name.removeprefix(stem)) for f in folder.glob(f"{stem}*") if finished(f)]
    rows = min((n for n in there if n >= rows), default=rows)
    written = folder / f"{stem}{rows}"
    jobs: list[dict[str, Any]] = []

    def once(job: dict[str, Any]) -> None:
        if not finished(job["folder"]) and job["folder"] not in [j["folder"] for j in jobs]:
            jobs.append({**job, "needs": []})

    for seed, variant in pairs:
        row = {**about, "variant": variant, "seed": seed, "commit": code, "jobs": args.jobs}
        left = left_of(texts, counts, done, *(str(row[k]) for k in same[2:]))
        if not left:
            continue
        blocks, _, end = variant.partition(";")
        job = {**common, "blocks": {**sizes, **parse(blocks)}, "last": parse(end), "seed": seed}
        make_recipe(**job["blocks"] | job["last"], seed=seed)  # before hours of work
        stem_of_blocks = "-".join(map(str, [*about.values(), seed])).replace("/", "_")
        job["folder"] = folder / f"{stem_of_blocks}-{blocks}"
        needs = [job["folder"]]
        once({**job, "stage": run_blocks})
        if job["last"].get("distill_generated"):
            needs.append(written)
            once({**job, "stage": run_generation, "folder": written, "rows": rows})
        jobs.append({**job, "stage": run_last, "needs": needs, "texts": left, "row": row})
    return jobs


def best_for(variant: str, first: str, out: Path, choose: list[str]) -> str:
    """``variant``, with the best end-to-end settings so far behind the BLOCKS of ``first`` in place of ``best``;
    settings behind ``best,`` take the place of those of the same name."""
    blocks, _, end = variant.partition(";")
    best, *changes = end.split(",")
    if best != BEST:
        return variant
    base = first.partition(";")[0]
    means = read_means(out) if out.exists() else {}
    found = [v for v in ranked(means, choose) if v.startswith(f"{base};distill_epochs")]
    if not found:
        raise SystemExit(f"{variant}: {out} has no variant {base};distill_epochs=... yet")
    changed = {c.partition("=")[0] for c in changes}
    kept = [s for s in found[0].partition(";")[2].split(",") if s.partition("=")[0] not in changed]
    return f"{blocks};{','.join([*changes, *kept])}"


def measure(jobs: list[dict[str, Any]], workers: int, deadline: float, out: Path) -> bool:
    """Run the jobs, always the first one that has what it needs, until ``deadline`` (monotonic seconds). Appends
    rows to ``out`` as they come; whether a job failed, which is reported while the others go on."""

    def ready(waiting: list[dict[str, Any]], running: list[dict[str, Any]]) -> list[dict[str, Any]]:
        writing = [j for j in [*running, *waiting] if j["stage"] is run_generation]
        if (
            writing
        ):  # token by token, it would wait for every other job: it has the device to itself, first
            return [] if running else writing[:1]
        return [j for j in waiting if all(map(finished, j["needs"]))]

    failed = False
    with appended(out, FIELDS) as append:
        for job, result, error in run_jobs(jobs, workers, deadline, ready):
            name = job["row"]["variant"] if "row" in job else job["folder"].name
            failed |= error is not None
            if error is not None:
                print("FAILED", job["seed"], name, error, flush=True)
            elif "row" in job:
                append(result)
                for row in result:
                    print(*(row[k] for k in FIELDS[:5]), row["last_seconds"], flush=True)
            else:
                (job["folder"] / "seconds").write_text(f"{result:.0f}")
                print(name, f"{result:.0f} s", flush=True)
    for job in jobs:
        print("not done:", job["seed"], job["row"]["variant"] if "row" in job else job["folder"].name)
    return failed


def read_means(file: Path) -> dict[str, dict[str, list[float]]]:
    """Variant -> text -> the perplexities of its seeds, on the most windows of that text; ``KL_TEXT`` -> the
    divergences of held-out rows after the last stage."""
    with file.open() as f:
        rows = list(csv.DictReader(f))
    most: dict[str, int] = {}
    for row in rows:
        most[row["text"]] = max(most.get(row["text"], 0), int(row["windows"]))
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if int(row["windows"]) == most[row["text"]]:
            texts = found.setdefault(row["variant"], {})
            texts.setdefault(row["text"], []).append(float(row["perplexity"]))
            if row["kl_held_after"]:
                texts.setdefault(KL_TEXT, []).append(float(row["kl_held_after"]))
    return found


def ranked(means: dict[str, dict[str, list[float]]], choose: list[str]) -> list[str]:
    """The variants, lowest mean log perplexity (or divergence) of ``choose`` first."""

    def rank(variant: str) -> float:
        texts = means[variant]
        return sum(math.log(mean(texts[t])) if t in texts else math.inf for t in choose)

    return sorted(means, key=rank)


def finished(folder: Path) -> bool:
    """Whether the stage that fills ``folder`` has run."""
    return (folder / "seconds").exists()


if __name__ == "__main__":
    sys.exit(main())
