"""Variants of the calibration, on validation text: one row per variant, seed and text.

    python benchmarks/ablation.py --model DIR --calib FILE.npy --text wikitext2-valid=FILE.npy \
        --variant 'w4a4;distill_epochs=10' --variant 'w4a4,rounding="gptq";distill_epochs=10,distill_lr=2e-3'

A variant is ``BLOCKS;LAST``: settings of the recipe for the stage block by block, then for the end-to-end stage
(empty: none); --variants takes a file of them. Variants with equal BLOCKS share that stage, which runs once; both stages run ``--jobs`` at a time on
one device. BLOCKS may begin with a scheme. Rows go to benchmarks/results/ablation.csv; rows that are there already
are not measured again.
"""

import argparse
import csv
import itertools
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
from vllm_flatquant.calibration.endtoend import LATENT, distill, generated_tokens
from vllm_flatquant.calibration.evaluate import perplexity, windows
from vllm_flatquant.calibration.meter import peak_memory
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
    x_q = x = x.to(stream_device(recipe, source, device))
    for i in range(source.num_blocks):
        x, x_q, tensors, _ = quantize_block(source, i, recipe, spec, x, x_q, kwargs[i], device)
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, block_file(job, i))
    return time.monotonic() - begin


def block_file(job: dict[str, Any], index: int) -> Path:
    """Where the tensors of a block lie between the stages."""
    return job["folder"] / f"block-{index}.safetensors"


def run_generation(job: dict[str, Any]) -> float:
    """Saves the rows that the model writes; seconds."""
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
                "perplexity": f"{perplexity(network, cut):.4f}",
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
    for file in args.variants:
        lines = map(str.strip, file.read_text().splitlines())
        args.variant += [line for line in lines if line and not line.startswith("#")]
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
    first: dict[str, dict[str, Any]] = {}
    last: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed, variant in itertools.product(args.seeds, args.variant):
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
            first.setdefault(str(job["folder"]), {**job, "stage": run_blocks})
            job["needs"] = [job["folder"]]
            if wanted := job["last"].get("distill_generated", 0):
                text = folder / f"{key}-generated-{wanted}"
                first.setdefault(str(text), {**job, "stage": run_generation, "folder": text})
                job["needs"].append(text)
            last.append({**job, "texts": left, "row": row})
        with ProcessPoolExecutor(args.jobs, mp_context=mp.get_context("spawn")) as pool:
            measure(pool, list(first.values()), last, args.out)


def measure(pool: ProcessPoolExecutor, first: list[dict], last: list[dict], out: Path) -> None:
    """Run both stages; a last stage starts as soon as what it needs is there. Appends rows to ``out``."""
    pending: dict[Future, dict] = {}
    for job in first:
        if not finished(job["folder"]):
            job["folder"].mkdir(parents=True, exist_ok=True)
            pending[pool.submit(job["stage"], job)] = job

    def submit_ready() -> None:
        for job in [j for j in last if all(map(finished, j["needs"]))]:
            last.remove(job)
            pending[pool.submit(run_last, job)] = job

    submit_ready()
    out.parent.mkdir(exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        if fresh:
            writer.writeheader()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job, result = pending.pop(future), future.result()
                if "row" in job:
                    writer.writerows(result)
                    f.flush()
                    for row in result:
                        print(*(row[k] for k in FIELDS[:5]), row["last_seconds"], flush=True)
                else:
                    (job["folder"] / "seconds").write_text(f"{result:.0f}")
                    print(job["folder"].name, f"{result:.0f} s", flush=True)
                    submit_ready()


def finished(folder: Path) -> bool:
    """Whether the stage that fills ``folder`` has run."""
    return (folder / "seconds").exists()


if __name__ == "__main__":
    main()
