"""Checkpoints served by the whole engine, compiled and with CUDA graphs, against the reference backend in bf16.

Perplexity, greedy tokens, `flatquant inspect --verify`, an OpenAI server under 10,000 mixed requests. The
checkpoints are those in the folders w4a4, w4a8 and w4a16 of FLATQUANT_TEST_CHECKPOINTS (with two shards, to test
two ranks), or else the example model, quantized here. FLATQUANT_TEST_DEVICE=cpu tries the tests themselves.

In bf16 every sum in another order can move codes, and what follows: with 4-bit activations the loss of a token
moves by about 0.5 nat at random and a best token can change that led by several nats. So many windows are averaged,
and the error of that average is part of the assertion; and how many best tokens change, and with what leads, is
compared with what rounding alone does (``noise.py``).
"""

import asyncio
import gc
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

from . import engines, noise
from .engines import CPU

if find_spec("vllm") is None or not (CPU or torch.cuda.is_available()):
    pytest.skip("needs vLLM and a CUDA GPU", allow_module_level=True)

from vllm_flatquant.calibration.data import calibration_tokens
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe
from vllm_flatquant.calibration.reference import read_spec
from vllm_flatquant.tools.server import serve

from ..soak import clients

DEVICE = "cpu" if CPU else "cuda"
WINDOW, ANSWER = 64, 8
WINDOWS = {"w4a4": 16384, "w4a8": 1024, "w4a16": 1024}
REQUESTS = {"w4a4": 10_000, "w4a8": 1000, "w4a16": 1000}
LONG = 10_000
"""So many requests tell whether memory grows."""
COMPARED = 4096
"""Windows, the first, whose best tokens are compared: float32 takes as long again."""
if CPU:
    WINDOWS = dict.fromkeys(WINDOWS, int(os.environ.get("FLATQUANT_TEST_WINDOWS", "24")))
    REQUESTS = dict.fromkeys(REQUESTS, 60)


@pytest.fixture(autouse=True)
def leave_the_device_to_others():
    yield
    gc.collect()


@pytest.fixture(scope="session")
def checkpoint(run_folder):
    """A function from a scheme to its checkpoint; made once for all processes of the run."""

    def get(scheme):
        given = os.environ.get("FLATQUANT_TEST_CHECKPOINTS")
        if given:
            return Path(given) / scheme
        out = run_folder / "checkpoints" / scheme
        with FileLock(run_folder / f"{scheme}.lock"):
            if not out.exists():  # quantize renames a finished folder to its name
                recipe = make_recipe(scheme=scheme, samples=16, seq_len=256, epochs=1, shards=2)
                quantize(engines.ROOT / "examples/tiny-llama", out, recipe, "stdlib", "auto")
        return out

    return get


CASES = [
    ("w4a4", "1", 1),
    ("w4a4", "0", 1),
    ("w4a8", "1", 1),
    ("w4a8", "0", 1),
    ("w4a16", "1", 1),
    ("w4a4", "1", 2),
    ("w4a8", "1", 2),
    ("w4a16", "1", 2),
]


@pytest.mark.parametrize(("scheme", "fusion", "ranks"), CASES)
def test_perplexity_and_greedy_tokens_are_the_references(
    tmp_path, checkpoint, record_property, scheme, fusion, ranks
):
    visible = engines.gpus(ranks)
    folder = checkpoint(scheme)
    if read_spec(folder).shards % ranks:
        pytest.skip(f"{folder} has no {ranks} shards")
    rows = calibration_tokens("stdlib", folder, WINDOWS[scheme], WINDOW, seed=1)
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
    answers, log = engines.answers(
        folder,
        rows.tolist(),
        tmp_path,
        *("--max-num-seqs=256", f"--max-tokens={ANSWER}", "--kv-cache-mib=512"),
        *("--options", '{"max_num_batched_tokens": 4096}'),  # of which each takes memory for its logits
        f"--tensor-parallel-size={ranks}",
        env=visible | binding | {"VLLM_FLATQUANT_FUSION": fusion},
    )
    assert f"FlatQuant {scheme}: {'torch' if CPU else 'triton'} backend" in log
    assert CPU or ("FlatQuant fusion" in log) == (fusion == "1")
    print(*(line for line in log.splitlines() if "FlatQuant" in line), sep="\n")

    model, exact_model = noise.load_both(folder, DEVICE)
    served = torch.tensor([answer["logprobs"][1:] for answer in answers])
    greedy = torch.tensor([answer["tokens"] for answer in answers])
    losses, everywhere, rounding, engine = [], [], [], []
    for start in range(0, len(rows), 64):
        window, tokens = rows[start : start + 64], greedy[start : start + 64]
        whole = torch.cat([window, tokens], dim=1)
        logprobs = noise.logprobs(model, whole)
        targets = window[:, 1:, None].to(logprobs.device)
        losses.append(-logprobs[:, : WINDOW - 1].gather(2, targets).squeeze(-1).cpu())
        if start < COMPARED:
            exact, best = noise.logprobs(exact_model, whole), logprobs.argmax(-1)
            everywhere.append(noise.changed_leads(exact, best))
            answered = slice(WINDOW - 1, -1)
            rounding.append(noise.changed_leads(exact[:, answered], best[:, answered]))
            engine.append(noise.changed_leads(exact[:, answered], tokens))
    loss = torch.cat(losses)
    difference = (-served - loss).mean(dim=1)
    relative = math.expm1(difference.mean().item())
    error = (difference.std() / len(difference) ** 0.5).item()
    expected, found = noise.counts(torch.cat(rounding)), noise.counts(torch.cat(engine))
    delta, largest = noise.delta(torch.cat(everywhere)), max(torch.cat(engine).tolist(), default=0)
    record_property(
        f"{scheme} fusion {fusion} TP {ranks}",
        f"perplexity {loss.mean().exp():.4f}, served {relative:+.4%} (standard error {error:.4%}) on "
        f"{loss.numel()} tokens; of {greedy[:COMPARED].numel()} best tokens change by lead {found}, "
        f"by rounding alone {expected}, largest lead {largest:.3f}, delta {delta:.3f}",
    )
    # No more than 0.1% off, as far as this many tokens can tell; and they must be able to.
    assert abs(relative) <= 1e-3 + 2 * error
    assert CPU or error <= 1e-3
    for lead, count in found.items():
        assert count <= noise.most_changes(expected[lead]), f"leads of at least {lead}"
    assert largest <= delta


@pytest.mark.parametrize("scheme", WINDOWS)
def test_verify_passes(tmp_path, checkpoint, record_property, scheme):
    command = [
        sys.executable,
        "-m",
        "vllm_flatquant.cli",
        "inspect",
        str(checkpoint(scheme)),
        "--verify",
    ]
    out, _ = engines.run(command, engines.environment(tmp_path), 300)
    lines = [line for line in out.splitlines() if line.startswith("verify ")]
    record_property(scheme, "; ".join(lines))
    assert [line.split(",")[0] for line in lines] == ["verify reference: ok", "verify vllm: ok"]


def memory(pid):
    """Bytes that process ``pid`` and its descendants have of the machine's memory and, if the driver tells, of GPUs."""
    resident = clients.resident_bytes(pid)
    if CPU:
        return resident
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    parent = psutil.Process(pid)
    family = {str(process.pid) for process in (parent, *parent.children(recursive=True))}
    used = [row.split(", ") for row in found.splitlines()]
    own = [float(mib) * 2**20 for process, mib in used if process in family and mib.isdigit()]
    return resident | ({"device_bytes": sum(own)} if own else {})


@pytest.mark.parametrize("scheme", WINDOWS)
def test_server_under_mixed_requests(tmp_path, checkpoint, record_property, scheme):
    """Answers alone are the reference's; 64 clients that cancel, disconnect and err then get the same ones."""
    folder = checkpoint(scheme)
    model, exact_model = noise.load_both(folder, DEVICE)
    context = model.config.max_position_embeddings
    longest = min(1000, context - 24)
    prompts = clients.random_prompts(16 if CPU else 64, model.config.vocab_size, longest)
    options = ["--served-model-name", "m", "--dtype", "bfloat16", "--max-num-seqs", "64"]
    options += ["--max-model-len", str(context), *engines.SMALL]
    options += ["--enforce-eager"] if CPU else ["--kv-cache-memory-bytes", str(1 << 30)]
    env = engines.environment(tmp_path)
    with serve(folder, *options, log=tmp_path / "log", timeout=300, env=env) as server:

        async def alone():
            async with clients.connect(server.address) as client:
                return await clients.record(client, "m", prompts, 24)

        references = asyncio.run(alone())
        rounding, engine = [], []
        for reference in references:
            tokens = torch.tensor([reference.tokens])
            whole = torch.tensor([reference.prompt + reference.tokens])
            exact = noise.logprobs(exact_model, whole)
            rounding.append(noise.changed_leads(exact, noise.logprobs(model, whole).argmax(-1)))
            engine.append(noise.changed_leads(exact[:, len(reference.prompt) - 1 : -1], tokens))
        delta, leads = noise.delta(torch.cat(rounding)), torch.cat(engine).tolist()
        record_property(
            scheme,
            f"{len(leads)} tokens are not the float32 reference's best, largest lead "
            f"{max(leads, default=0):.3f}, delta {delta:.3f}",
        )
        assert max(leads, default=0) <= delta
        report = asyncio.run(
            clients.run(
                server.address,
                "m",
                clients.plan(references, REQUESTS[scheme]),
                clients=64,
                delta=delta,
                too_long=context + 1,
                watch=lambda: memory(server.pid),
                every=0.2,
            )
        )
        record_property(scheme, report.summary())
        assert report.wrong == []
        assert report.errors == []
        assert sum(report.done.values()) == REQUESTS[scheme]
        assert report.checked > REQUESTS[scheme]
        assert list(clients.idle(server.address).values()) == [0, 0, 0]
    if REQUESTS[scheme] >= LONG:  # over a few seconds nothing can be told
        for name, most in (("resident_bytes", 256 * 2**20), ("device_bytes", 64 * 2**20)):
            samples = [sample for sample in report.samples if name in sample]
            if name == "device_bytes" and not samples:
                record_property(
                    scheme, "GPU memory not measured: nvidia-smi lists no process of the server"
                )
                continue
            grown = clients.growth(samples, name)
            record_property(scheme, f"{name} grew by {grown / 2**20:+.1f} MiB")
            assert grown < most
