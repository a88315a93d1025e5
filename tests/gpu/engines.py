"""Engines that the tests start in processes of their own, beside those of other tests on the same GPU."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CPU = os.environ.get("FLATQUANT_TEST_DEVICE") == "cpu"
SMALL = ["--gpu-memory-utilization", "0.02"]
"""What must be free at the start. vLLM measures nothing where the size of the KV cache is given, as it must be
here: other tests take and free memory meanwhile."""


def gpus(count: int) -> dict[str, str]:
    """The environment in which a process sees ``count`` GPUs; skips the test where there are fewer."""
    names = list(filter(None, os.environ.get("FLATQUANT_TEST_GPUS", "").split(",")))
    if not CPU and (len(names) or torch.cuda.device_count()) < count:
        pytest.skip(f"needs {count} GPUs")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])} if names else {}


def environment(work: Path) -> dict[str, str]:
    """For child processes: this tree, the plugin's entry point if it is not installed, and compile caches in ``work``.

    The caches start empty, so that every engine compiles, and says what it fused; only vLLM's description of its
    model classes is kept, which costs a process of its own each time, and Triton's binaries.
    """
    folders = [str(ROOT)]
    if not any(point.name == "flatquant" for point in entry_points(group="vllm.general_plugins")):
        info = work / "site" / "vllm_flatquant-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-flatquant\nVersion: 0\n")
        plugin = "[vllm.general_plugins]\nflatquant = vllm_flatquant:register\n"
        (info / "entry_points.txt").write_text(plugin)
        folders.append(str(info.parent))
    caches = work / "vllm-cache"
    models = Path(os.environ.get("VLLM_CACHE_ROOT") or Path.home() / ".cache/vllm") / "modelinfos"
    for folder in (models, caches):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (caches / "modelinfos").symlink_to(models)
    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton/cache"
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(caches),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor-cache"),
        "TRITON_CACHE_DIR": str(triton),
    }


def run(command: list[str], env: dict[str, str], timeout: float, stdin: str = "") -> tuple[str, str]:
    """Standard output and error of a process that must succeed; ends with it whatever it has started."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | env,
        text=True,
        start_new_session=True,
    )
    problem = ""
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        problem = f"not finished after {timeout:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if problem:
        out, err = process.communicate()
    elif process.returncode:
        problem = f"ended with status {process.returncode}"
    if problem:
        lines = [line for line in out.splitlines() if "Error" in line]
        tails = f"{chr(10).join(lines[:20])}\n...\n{out[-3000:]}\n...\n{err[-4000:]}"
        pytest.fail(f"{' '.join(command)}\n{tails}\n{problem}", pytrace=False)
    return out, err


def answers(
    folder: Path, prompts: list[list[int]], work: Path, *options: str, env: dict[str, str]
) -> tuple[list[dict], str]:
    """Each prompt's greedy tokens and log-probabilities by an engine in bf16, compiled and with CUDA graphs (on a
    CPU neither), and its log. options: of ``engine_script.py``."""
    script, out = ROOT / "tests/cpu/engine_script.py", work / "out.json"
    command = [sys.executable, str(script), str(folder), str(out), "--dtype=bfloat16", *SMALL, *options]
    if CPU:
        command.append("--enforce-eager")
    log = run(command, environment(work) | env, 300, json.dumps(prompts))
    return json.loads(out.read_text(encoding="utf-8")), "".join(log)
