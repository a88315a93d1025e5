"""`serving.py --serve`: one format as a live server under `vllm bench serve`, then `vllm bench throughput`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_flatquant.tools.server import serve

HERE = Path(__file__).resolve().parent
VLLM = [sys.executable, str(HERE / "vllm_here.py")]
INPUT, OUTPUT = 512, 128
RATES = (4, 24)
"""Requests per second: a quiet and a busy server, for an 8B model on one H100."""
SECONDS = 8
"""Of requests at each rate."""
PROMPTS = 512
"""Requests that come all at once, for the throughput: two full batches of the 256 that the engine takes."""
FIGURES = {
    "ttft": ("median_ttft_ms", "ms"),
    "ttft_p99": ("p99_ttft_ms", "ms"),
    "itl": ("median_itl_ms", "ms"),
    "itl_p99": ("p99_itl_ms", "ms"),
    "requests": ("request_throughput", "requests/s"),
    "tokens": ("output_throughput", "tokens/s"),
}
AT_ONCE, LAST = "rateinf_total", "throughput"
"""Prompt and output tokens of requests that come all at once: at the server, and without one (measured last)."""


def measure(run: Any, model: str, name: str) -> Iterator[dict[str, Any]]:
    """Rows of one format: a server's throughput, its latencies at each request rate, and the throughput without a
    server. What fails is an error row."""
    work = run.folder(model, name)
    folder = run.model(model, name)
    environment = run.environment(model, name)
    tiny = model == "tiny"
    sizes = [
        "--random-input-len",
        str(32 if tiny else INPUT),
        "--random-output-len",
        str(8 if tiny else OUTPUT),
    ]
    data = ["--dataset-name", "random", *sizes, "--seed", "0"]
    # Graphs of the sizes that users get: prompts beside few others fit into the largest, 512 tokens.
    engine = {
        key: value for key, value in run.options(model, name).items() if key != "compilation_config"
    }
    options, at_once = _options(engine), 4 if tiny else PROMPTS
    try:
        with serve(
            folder,
            *options,
            log=work / "serve.log",
            timeout=run.args.limit,
            env=environment,
            vllm=VLLM,
        ) as server:

            def load(rate: str, count: int) -> dict[str, Any]:
                return _load(work, folder, server.address, data, rate, count, environment)

            value = load("inf", at_once)["total_token_throughput"]
            yield {"measure": AT_ONCE, "value": value, "unit": "tokens/s", "repeats": 1}
            for rate in RATES:
                figures = load(str(rate), 8 if tiny else SECONDS * rate)
                for figure, (key, unit) in FIGURES.items():
                    row = {"measure": f"rate{rate}_{figure}", "value": figures[key]}
                    yield row | {"unit": unit, "repeats": 1}
        value = _throughput(work, folder, [*data, *options], at_once, environment)
        yield {"measure": LAST, "value": value, "unit": "tokens/s", "repeats": 1}
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


def _load(
    work: Path,
    model: Path,
    address: str,
    data: list[str],
    rate: str,
    count: int,
    environment: dict[str, str],
) -> dict[str, Any]:
    """What `vllm bench serve` says of ``count`` requests at ``rate`` a second, or all at once ("inf")."""
    out, log = work / f"rate{rate}.json", work / "bench-serve.log"
    command = ["bench", "serve", "--backend", "vllm", "--base-url", address, "--model", str(model)]
    command += [*data, "--num-prompts", str(count), "--request-rate", rate, "--ignore-eos"]
    command += ["--save-result", "--result-dir", str(work), "--result-filename", out.name]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--disable-tqdm", "--num-warmups", "4"]
    _bench(command, log, environment)
    figures = json.loads(out.read_text())
    if figures["completed"] != count:
        raise RuntimeError(f"{figures['completed']} of {count} requests were completed at {rate}/s")
    return figures


def _throughput(
    work: Path, model: Path, arguments: list[str], count: int, environment: dict[str, str]
) -> float:
    """Tokens a second, as `vllm bench throughput` says for ``count`` requests."""
    out = work / "throughput.json"
    command = ["bench", "throughput", "--model", str(model), "--num-prompts", str(count)]
    command += ["--output-json", str(out), *arguments]
    _bench(command, work / "throughput.log", environment)
    return json.loads(out.read_text())["tokens_per_second"]


def _bench(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run `vllm bench ...`; RuntimeError with the log's end if it fails."""
    with log.open("a") as file:
        done = subprocess.run(
            [*VLLM, *command],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        )
    if done.returncode:
        end = "\n    ".join(log.read_text(errors="replace").splitlines()[-12:])
        raise RuntimeError(
            f"vllm {' '.join(command[:2])} ended with {done.returncode}; the end of {log}:\n    {end}"
        )
