"""``flatquant quantize --dry-run`` against what then happens: time, memory and disk of the same run.

``python -m tests.soak.plans`` does it on the example model and on a wider random one. A run's memory and files are
watched from outside.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def make_estimate(model: Path, out: Path, recipe: Recipe, calib: str, found: Any) -> None:
    """Put the plan as a dict into ``found``."""
    found.put(asdict(plan_run(model, out, recipe, calib, "cpu")[0]))


def start(target: Any, *arguments: Any) -> Any:
    """A process forked from one that has imported everything: each has the same memory to begin with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [plan_run.__module__, "transformers.models.llama.modeling_llama", __name__]
    )
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def compare(model: Path, folder: Path, recipe: Recipe, calib: str) -> dict[str, dict[str, float]]:
    """What was estimated for a run, and what was then measured: bytes of memory (resident) and disk, seconds."""
    found = multiprocessing.get_context("forkserver").Queue()
    out = folder / "out"
    process = start(make_estimate, model, out, recipe, calib, found)
    plan = found.get(timeout=600)
    process.join()
    begun, memory, disk = time.monotonic(), 0, 0
    process = start(quantize, model, out, recipe, calib, "cpu")
    while process.exitcode is None:
        memory = max(memory, resident(process.pid))
        disk = max(disk, stored(staging_folder(out)))
        process.join(0.004)
    assert process.exitcode == 0
    return {
        "estimated": {"cpu": plan["cpu"], "staging": plan["staging"], "checkpoint": plan["checkpoint"]}
        | {"seconds": plan["seconds"], "mapped": plan["mapped"]},
        "measured": {"cpu": memory, "staging": disk, "checkpoint": stored(out)}
        | {"seconds": time.monotonic() - begun},
    }


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["example", "wide"])
    only, failed = parser.parse_args().only, False
    for name, work in {"example": example, "wide": wide}.items():
        if only in (None, name):
            with tempfile.TemporaryDirectory() as temporary:
                result = work(Path(temporary))
            off = errors(result)
            print(json.dumps({"model": name, **result, "off": off}), flush=True)
            failed |= any(abs(value) > WITHIN for value in off.values())
    raise SystemExit(failed)
