"""Variants of the calibration, on validation text: one row per variant, seed and text.

    python benchmarks/ablation.py --model DIR --calib FILE.npy --text wikitext2-valid=FILE.npy \
        --variant 'w4a4;distill_epochs=10' --variant 'w4a4,rounding="gptq";distill_epochs=10,distill_lr=2e-3'

A variant is ``BLOCKS;LAST``: settings of the recipe for the stage block by block, then for the end-to-end stage
(empty: none); --variants takes a file of them, most wanted first. Variants with equal BLOCKS share that stage,
which runs once; ``--jobs`` stages run at a time on one device. BLOCKS may begin with a scheme. Rows go to
benchmarks/results/ablation.csv as they come; rows that are there already are not measured again.
"""

import argparse
import csv
import gc
import itertools
import json
import math
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
from vllm_flatquant.calibration.endtoend import LATENT, distill, generated_tokens
from vllm_flatquant.calibration.evaluate import perplexity, windows
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
    "blocks_seconds",
    "last_seconds",
    "peak_memory_gb",
    "device",
    "torch",
    "transformers",
    "version",
    "commit",
]
GENERATED = "tokens.safetensors"
EVAL_BATCH = 8


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
    """Saves the rows that the model writes (for the first seed; the others use them too); seconds."""
    device, begin = start(job), time.monotonic()
    source = ModelSource(job["model"])
    recipe = make_recipe(**job["blocks"], seed=job["seed"])
    tokens = calibration_tokens(job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed)
    count = job["last"]["distill_generated"]
    more = generated_tokens(source, tokens, count, recipe.seed, device)
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
    kl: tuple[float, float] | tuple[str, str] = ("", "")
    if recipe.distill_epochs:
        tokens = calibration_tokens(
            job["calib"], source.path, recipe.samples, recipe.seq_len, recipe.seed
        )
        if recipe.distill_generated:
            tokens = torch.cat([tokens, load_file(job["needs"][1] / GENERATED)["tokens"]])
        blocks, changed, report = distill(source, blocks, tokens, recipe, spec, device)
        others, kl = others | changed, (report.kl_first_epoch, report.kl_last_epoch)
    seconds = time.monotonic() - begin
    network = assemble(source, spec, blocks, others, device)
    rows = []
    for text, file in job["texts"]:
        cut = windows(read_tokens(job["model"], file), job["blocks"]["seq_len"], job["limit"])
        rows.append(
            {
                **job["row"],
                "text": text,
                "perplexity": f"{perplexity(network, cut, EVAL_BATCH):.4f}",
                "windows": len(cut),
                "kl_first": kl[0],
                "kl_last": kl[1],
                "blocks_seconds": (job["folder"] / "seconds").read_text(),
                "last_seconds": f"{seconds:.0f}",
                "peak_memory_gb": f"{peak_memory(device):.2f}",
                **machine(device),
            }
        )
    return rows


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


def main() -> None:
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
    parser.add_argument("--choose", action="append", help="text that decides the order of the summary")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder where the stage block by block stays")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    begin = time.monotonic()
    args.variant += read_variants(args.variants)
    args.once = read_variants(args.once)
    if not args.variant:
        parser.error("give --variant or --variants")

    texts = [tuple(t.split("=", 1)) for t in args.text]
    counts = {
        t: str(len(windows(read_tokens(args.model, f), args.seq_len, args.limit))) for t, f in texts
    }
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
        "limit": args.limit,
        "device": args.device,
        "threads": max(1, mp.cpu_count() // args.jobs),
    }
    code = commit()
    first: set[Path] = set()
    jobs: list[dict[str, Any]] = []

    def once(job: dict[str, Any]) -> None:
        if job["folder"] not in first:
            first.add(job["folder"])
            jobs.append({**job, "needs": []})

    with tempfile.TemporaryDirectory() as temporary:
        pairs = [
            *itertools.product(args.seeds, args.variant),
            *itertools.product(args.seeds[:1], args.once),
        ]
        for seed, variant in pairs:
            row = {**about, "variant": variant, "seed": seed, "commit": code}
            left = [
                (t, f)
                for t, f in texts
                if tuple(str({**row, "text": t, "windows": counts[t]}[k]) for k in same) not in done
            ]
            if not left:
                continue
            blocks, _, end = variant.partition(";")
            job = {**common, "blocks": {**sizes, **parse(blocks)}, "last": parse(end), "seed": seed}
            make_recipe(**job["blocks"] | job["last"], seed=seed)  # before hours of work
            key = "-".join(map(str, [*about.values(), seed])).replace("/", "_")
            folder = args.keep or Path(temporary)
            job["folder"] = folder / f"{key}-{blocks}"
            needs = [job["folder"]]
            once({**job, "stage": run_blocks})
            if wanted := job["last"].get("distill_generated", 0):
                needs.append(folder / f"{about['model']}-{args.seq_len}-generated-{wanted}")
                once({**job, "stage": run_generation, "folder": needs[-1]})
            jobs.append({**job, "stage": run_last, "needs": needs, "texts": left, "row": row})
        with ProcessPoolExecutor(args.jobs, mp_context=mp.get_context("spawn")) as pool:
            measure(pool, args.jobs, jobs, args.out, begin + args.seconds)
    summary(args.out, args.choose or [t for t, _ in texts])


def measure(
    pool: ProcessPoolExecutor,
    jobs: int,
    waiting: list[dict[str, Any]],
    out: Path,
    deadline: float,
) -> None:
    """Run the jobs, ``jobs`` at a time, always the first one in ``waiting`` that has what it needs, until
    ``deadline`` (monotonic seconds). Appends rows to ``out`` as they come; a job that fails is reported, and the
    others go on."""
    pending: dict[Future, dict] = {}
    waiting = [j for j in waiting if "row" in j or not finished(j["folder"])]
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        if fresh:
            writer.writeheader()
        while True:
            writing = [j for j in [*pending.values(), *waiting] if j["stage"] is run_generation]
            # Token by token, it would wait for every other job: it has the device to itself, first.
            ready = writing and [j for j in writing if j in waiting]
            ready = ready or [j for j in waiting if not writing and all(map(finished, j["needs"]))]
            for job in ready[: 1 - len(pending) if writing else jobs - len(pending)]:
                waiting.remove(job)
                job["folder"].mkdir(parents=True, exist_ok=True)
                pending[pool.submit(job["stage"], job)] = job
            left = deadline - time.monotonic()
            if not pending or left <= 0:
                break
            for future in wait(pending, timeout=left, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                name = job["row"]["variant"] if "row" in job else job["folder"].name
                if error := future.exception():
                    print("FAILED", job["seed"], name, repr(error), flush=True)
                elif "row" in job:
                    writer.writerows(future.result())
                    f.flush()
                    for row in future.result():
                        print(*(row[k] for k in FIELDS[:5]), row["last_seconds"], flush=True)
                else:
                    (job["folder"] / "seconds").write_text(f"{future.result():.0f}")
                    print(name, f"{future.result():.0f} s", flush=True)
    for job in [*pending.values(), *waiting]:
        print("not done:", job["seed"], job["row"]["variant"] if "row" in job else job["folder"].name)
    for worker in mp.active_children():
        worker.kill()  # what is not done by now is not wanted


def summary(file: Path, choose: list[str]) -> None:
    """Prints each variant's mean perplexity over its seeds, lowest mean log perplexity of the texts ``choose``
    first."""
    found: dict[str, dict[str, list[float]]] = {}
    with file.open() as f:
        for row in csv.DictReader(f):
            texts = found.setdefault(row["variant"], {})
            texts.setdefault(row["text"], []).append(float(row["perplexity"]))
    means = {v: {t: sum(p) / len(p) for t, p in texts.items()} for v, texts in found.items()}

    def rank(variant: str) -> float:
        return sum(math.log(means[variant].get(text, math.inf)) for text in choose)

    for variant in sorted(means, key=rank):
        seeds = max(map(len, found[variant].values()))
        print(variant, f"seeds={seeds}", *(f"{t}={p:.4f}" for t, p in means[variant].items()))


def finished(folder: Path) -> bool:
    """Whether the stage that fills ``folder`` has run."""
    return (folder / "seconds").exists()


if __name__ == "__main__":
    main()
