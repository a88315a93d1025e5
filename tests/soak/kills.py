"""Kill quantization runs at random moments and let them go on: nothing finished is lost, and every byte is the same.

``python -m tests.soak.kills --kills 50`` does it on a small model; ``make test`` does it with fewer.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from vllm_flatquant.calibration.quantize import Callbacks, quantize
from vllm_flatquant.calibration.recipe import Recipe, make_recipe
from vllm_flatquant.calibration.staging import finished_blocks, read_run, staging_folder

from ..cpu.tiny_model import make_model, random_tokens

BLOCKS = 6
LIMIT = 120
"""Seconds after which a run that was not killed counts as stuck."""


def announce(file: Path, _: object) -> None:
    """Note that a block was reported as finished."""
    with file.open("a") as f:
        f.write("block\n")


def start(model: Path, out: Path, recipe: Recipe, calib: Path, said: Path, resume: bool):
    """A quantization run in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([quantize.__module__, "transformers.models.llama.modeling_llama"])
    process = context.Process(
        target=quantize,
        args=(model, out, recipe, str(calib), "cpu"),
        kwargs={"resume": resume, "callbacks": Callbacks(block=partial(announce, said))},
    )
    process.start()
    return process


def contents(out: Path) -> dict[str, bytes]:
    """What must be the same, bit for bit: config, documents and safetensors; of the log all but time and memory."""
    files = {f.name: f.read_bytes() for f in out.iterdir() if f.name != "calibration_log.jsonl"}
    for i, line in enumerate((out / "calibration_log.jsonl").read_text().splitlines()):
        entry = {k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_memory_gb")}
        files[f"log {i}"] = json.dumps(entry).encode()
    return files


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of each finished block's tensors: a block done again would have others."""
    files = sorted(staging_folder(out).glob("block-*[0-9]/tensors-*.safetensors"))
    return {f.parent.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def kill_at_random_moments(folder: Path, kills: int, seed: int = 0, **settings) -> dict[str, int]:
    """Kill -9 ``kills`` times over as many runs as it takes, and compare every finished checkpoint.

    folder: an empty folder to work in. settings: of the recipe. Returns counts: kills, kills that found a
    finished block, finished checkpoints. Raises AssertionError if a block or a byte is lost.
    """
    import numpy as np

    model = make_model(folder / "model", num_hidden_layers=BLOCKS)
    calib, said = folder / "calib.npy", folder / "said"
    np.save(calib, random_tokens(8, 24).numpy())
    recipe = make_recipe(
        **{"samples": 8, "seq_len": 24, "epochs": 6, "batch_size": 2, "rounding": "gptq", **settings}
    )

    def whole_run(out: Path) -> float:
        begun = time.monotonic()
        process = start(model, out, recipe, calib, said, resume=False)
        process.join(LIMIT)
        assert process.exitcode == 0
        return time.monotonic() - begun

    whole_run(folder / "first")  # the second is as warm as all that follow
    seconds = whole_run(folder / "expected")
    expected, out = contents(folder / "expected"), folder / "out"
    assert contents(folder / "first") == expected
    chance = random.Random(seed)
    counts = {"kills": 0, "kills_after_a_block": 0, "checkpoints": 0}
    known: dict[str, tuple[int, int]] = {}
    said.unlink()
    while counts["kills"] < kills or counts["checkpoints"] == 0:
        process = start(model, out, recipe, calib, said, resume=read_run(out) is not None)
        if counts["kills"] < kills:
            process.join(chance.uniform(0, 0.7 * seconds))
            if process.is_alive():
                process.kill()
                counts["kills"] += 1
        process.join(LIMIT)
        assert process.exitcode in (0, -9), "a resumed run failed"
        if read_run(out) is None and (out / "config.json").exists():  # or killed while it tidied up
            assert contents(out) == expected
            assert process.exitcode == -9 or not staging_folder(out).exists()
            for file in out.iterdir():
                file.unlink()
            counts["checkpoints"] += 1
            known = {}
            said.unlink(missing_ok=True)
        elif not (out / "config.json").exists():
            assert process.exitcode == -9
            found = finished_files(out)
            announced = len(said.read_text().splitlines()) if said.exists() else 0
            assert announced <= finished_blocks(out) == len(found)
            assert {k: found.get(k) for k in known} == known, "a finished block was lost or done again"
            known = found
            counts["kills_after_a_block"] += bool(found)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(kill_at_random_moments(Path(temporary), given.kills, given.seed)))
