"""`serving.py --serve`: vLLM's own benchmarks of one format, `bench throughput` and `bench serve` on a live server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving_formats import FORMATS, write_model

from vllm_flatquant.tools.server import serve

HERE = Path(__file__).resolve().parent
VLLM = [sys.executable, str(HERE / "vllm_here.py")]
INPUT, OUTPUT = 512, 128
RATES = (4, 24)
"""Requests per second: a quiet and a busy server, for an 8B model on one H100."""
FIGURES = {
    "ttft": ("median_ttft_ms", "ms"),
    "ttft_p99": ("p99_ttft_ms", "ms"),
    "itl": ("median_itl_ms", "ms"),
    "itl_p99": ("p99_itl_ms", "ms"),
    "requests": ("request_throughput", "requests/s"),
    "tokens": ("output_throughput", "tokens/s"),
}
LAST = f"rate{RATES[-1]}_{list(FIGURES)[-1]}"
"""The measure that comes last."""


def measure(run: Any, model: str, name: str) -> Iterator[dict[str, Any]]:
    """Rows of one format: throughput, and latencies at each request rate. What fails is an error row."""
    work = run.folder(model, name)
    folder = write_model(work / "model", model, FORMATS[name], run.size)
    environment = run.environment(model, name)
    tiny = model == "tiny"
    sizes = [
        "--random-input-len",
        str(32 if tiny else INPUT),
        "--random-output-len",
        str(8 if tiny else OUTPUT),
    ]
    data = ["--dataset-name", "random", *sizes, "--seed", "0"]
    options = _options(run.options(model, name))
    try:
        yield from _throughput(work, folder, [*data, *options], 4 if tiny else 1000, environment)
        with serve(
            folder,
            *options,
            log=work / "serve.log",
            timeout=run.args.limit,
            env=environment,
            vllm=VLLM,
        ) as server:
            for rate in RATES:
                count = 8 if tiny else 12 * rate
                yield from _rate(work, folder, server.address, data, rate, count, environment)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        yield {"error": f"{name}: {error}"}


def _options(options: dict[str, Any]) -> list[str]:
    """The engine's options as the command line takes them."""
    found = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def _bench(work: Path, kind: str, arguments: list[str], environment: dict[str, str]) -> None:
    log = work / f"{kind}.log"
    with log.open("a") as file:
        done = subprocess.run(
            [*VLLM, "bench", *arguments],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        )
    if done.returncode:
        end = "\n    ".join(log.read_text(errors="replace").splitlines()[-12:])
        raise RuntimeError(
            f"vllm bench {arguments[0]} ended with {done.returncode}; the end of {log}:\n    {end}"
        )


def _throughput(
    work: Path, model: Path, arguments: list[str], count: int, environment: dict[str, str]
) -> list[dict[str, Any]]:
    out = work / "throughput.json"
    command = [
        "throughput",
        "--model",
        str(model),
        "--num-prompts",
        str(count),
        "--output-json",
        str(out),
    ]
    _bench(work, "throughput", [*command, *arguments], environment)
    figures = json.loads(out.read_text())
    return [
        {
            "measure": "throughput",
            "value": figures["tokens_per_second"],
            "unit": "tokens/s",
            "repeats": 1,
        }
    ]


def _rate(
    work: Path,
    model: Path,
    address: str,
    data: list[str],
    rate: int,
    count: int,
    environment: dict[str, str],
) -> list[dict[str, Any]]:
    out = work / f"rate{rate}.json"
    command = ["serve", "--backend", "vllm", "--base-url", address, "--model", str(model), *data]
    command += [
        "--num-prompts",
        str(count),
        "--request-rate",
        str(rate),
        "--ignore-eos",
        "--save-result",
    ]
    command += ["--result-dir", str(work), "--result-filename", out.name]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--disable-tqdm"]
    _bench(work, "bench-serve", command, environment)
    figures = json.loads(out.read_text())
    if figures["completed"] != count:
        raise RuntimeError(f"{figures['completed']} of {count} requests were completed at {rate}/s")
    return [
        {"measure": f"rate{rate}_{name}", "value": figures[key], "unit": unit, "repeats": 1}
        for name, (key, unit) in FIGURES.items()
    ]
