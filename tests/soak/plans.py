"""``flatquant quantize --dry-run`` against what then happens: time, memory and disk of the same run.

``python -m tests.soak.plans`` does it on the example model and on a wider random one; with ``--shape`` on random blocks of
a real model's size, such as ``--shape 70b --blocks 2 --device cuda --samples 128 --seq-len 2048 --epochs 1``. A run's memory and
files are watched from outside, a GPU's memory is that of the log.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_flatquant.calibration.meter import limit_memory, total_memory
from vllm_flatquant.calibration.plan import plan_run
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import Recipe, make_recipe
from vllm_flatquant.calibration.staging import staging_folder

from ..cpu.tiny_model import make_model

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 0.15
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
}


SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
"""Llama 3's, which share the rest."""


def make_shape(folder: Path, shape: str, blocks: int, device: str = "cpu") -> Path:
    """A random bf16 Llama with real-sized blocks, drawn on ``device`` and written block by block."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], num_key_value_heads=8, vocab_size=128256, num_hidden_layers=blocks
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name in shapes:
        groups.setdefault(name.rpartition(".layers.")[2].partition(".")[0], {})[name] = torch.empty(0)
    index = {}
    for number, names in enumerate(groups.values()):
        file = f"part-{number}.safetensors"
        for name in names:
            if len(shapes[name]) == 1:
                names[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            else:
                scale = shapes[name][-1] ** -0.5
                noise = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
                names[name] = noise.normal_(std=scale).cpu()
        save_file(names, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
        names.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


MAPPED_BYTES, M_MMAP_THRESHOLD = 2**20, -3
"""Blocks of memory of this size are mapped one by one; glibc's name for that setting."""


def clock(device: str, memory_gb: float | None) -> Any:
    """A clock that starts now, in a process that measures the same however often it is done.

    On the CPU, processor time of a single thread, which other work on the machine does not lengthen; everything in
    this process then counts so. Tensors of 1 MiB are mapped one by one, as glibc does with all of 32 MiB, so with
    those of a real model: smaller ones would leave holes in its heap, up to 100 MB that no two processes share.
    memory_gb: a GPU seems to have no more than this.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    if memory_gb:
        import torch

        where = torch.device(device)
        limit_memory(where, memory_gb * 1e9 / total_memory(where))
    if device == "cpu":
        import torch

        torch.set_num_threads(1)
        time.monotonic = time.process_time
    begun = time.monotonic()
    return lambda: time.monotonic() - begun


def make_estimate(
    model: Path, out: Path, recipe: Recipe, calib: str, device: str, memory_gb: float | None, found: Any
) -> None:
    """Put the plan as a dict into ``found``."""
    clock(device, memory_gb)
    found.put(asdict(plan_run(model, out, recipe, calib, device)[0]))


def make_run(
    model: Path, out: Path, recipe: Recipe, calib: str, device: str, memory_gb: float | None, found: Any
) -> None:
    """Quantize, and put the seconds that it took into ``found``."""
    seconds = clock(device, memory_gb)
    quantize(model, out, recipe, calib, device)
    found.put(seconds())


def start(target: Any, *arguments: Any) -> Any:
    """A process forked from one that has imported everything: each has the same memory to begin with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [plan_run.__module__, "transformers.models.llama.modeling_llama", __name__]
    )
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def compare(
    model: Path,
    folder: Path,
    recipe: Recipe,
    calib: str,
    device: str = "cpu",
    memory_gb: float | None = None,
) -> dict[str, dict[str, float]]:
    """What was estimated for a run, and what was then measured: bytes of memory (resident) and disk, seconds (on
    the CPU processor time of one thread)."""
    found = multiprocessing.get_context("forkserver").Queue()
    out = folder / "out"
    process = start(make_estimate, model, out, recipe, calib, device, memory_gb, found)
    plan = found.get(timeout=3600)
    process.join()
    memory = disk = 0
    process = start(make_run, model, out, recipe, calib, device, memory_gb, found)
    while process.exitcode is None:
        memory = max(memory, resident(process.pid))
        disk = max(disk, stored(staging_folder(out)))
        process.join(0.004)
    assert process.exitcode == 0
    names = ("cpu", "staging", "checkpoint", "seconds", *(["gpu"] if plan["gpu"] else []))
    measured = {"cpu": memory, "staging": disk, "checkpoint": stored(out)}
    measured["seconds"] = found.get(timeout=60)
    if plan["gpu"]:
        log = (out / "calibration_log.jsonl").read_text().splitlines()
        measured["gpu"] = max(json.loads(line)["peak_memory_gb"] for line in log) * 1e9
    return {"estimated": {k: plan[k] for k in (*names, "mapped")}, "measured": measured}


def resident(pid: int) -> int:
    """Resident bytes of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def stored(folder: Path) -> int:
    """Bytes of the files below a folder, each counted once whatever its names."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.stat(os.path.join(place, name))
            except FileNotFoundError:
                continue  # moved meanwhile
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def errors(result: dict[str, dict[str, float]]) -> dict[str, float]:
    """Estimate over measurement, less one."""
    return {k: round(result["estimated"][k] / v - 1, 3) for k, v in result["measured"].items()}


def example(folder: Path) -> dict[str, dict[str, float]]:
    """The example model, GPTQ."""
    settings = {"samples": 48, "seq_len": 512, "epochs": 2, "rounding": "gptq"}
    return compare(ROOT / "examples" / "tiny-llama", folder, make_recipe(**settings), "stdlib")


def wide(folder: Path) -> dict[str, dict[str, float]]:
    """A random model with streams and blocks that outweigh the libraries."""
    import numpy as np

    settings = {"samples": 128, "seq_len": 256, "epochs": 1}
    model = make_model(folder / "model", **WIDE)
    ids = np.random.default_rng(0).integers(0, WIDE["vocab_size"], (128, 256))
    np.save(folder / "calib.npy", ids)
    return compare(model, folder, make_recipe(**settings), str(folder / "calib.npy"))


def real_sized(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Random blocks of a real model's size."""
    import numpy as np

    model = make_shape(folder / "model", options.shape, options.blocks, options.device)
    ids = np.random.default_rng(0).integers(0, 128256, (options.samples, options.seq_len))
    np.save(folder / "calib.npy", ids)
    settings = {k: getattr(options, k) for k in ("samples", "seq_len", "epochs", "rounding")}
    calib, recipe = str(folder / "calib.npy"), make_recipe(**settings)
    return compare(model, folder, recipe, calib, options.device, options.memory_gb)


def main() -> int:
    """Compare, print a line of JSON for each model; 1 if an estimate is off by more than ``WITHIN``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["example", "wide"])
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounding", default="rtn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-gb", type=float, help="as if the GPU had no more than this")
    parser.add_argument("--folder", type=Path, help="where to work [the system's temporary folder]")
    options, failed = parser.parse_args(), False
    work = {"example": example, "wide": wide}
    if options.shape:
        work = {options.shape: lambda folder: real_sized(folder, options)}
    for name, measure in work.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
                result = measure(Path(temporary))
            off = errors(result)
            print(json.dumps({"model": name, **result, "off": off}), flush=True)
            failed |= any(abs(value) > WITHIN for value in off.values())
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
