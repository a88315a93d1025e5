"""The vLLM engine, end to end on the CPU, against the checkpoint run by Transformers and the references.

Two engine starts: one with the compiler, as users run it (where a C++ compiler is to be had), one with two
tensor-parallel ranks.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_flatquant.calibration.reference import load_reference

from .tiny_checkpoint import VOCAB, Recipe, write_checkpoint

SCRIPT = Path(__file__).with_name("engine_script.py")
LENGTHS = (24, 7, 40)
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def prompts():
    """Random token ids of several lengths, which the engine batches."""
    torch.manual_seed(1)
    return [torch.randint(2, VOCAB, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """W4A4 with a 4-bit KV cache and two shards, float32."""
    folder = tmp_path_factory.mktemp("served")
    write_checkpoint(folder, Recipe(k_bits=4, v_bits=4, shards=2))
    return folder


def run_engine(checkpoint, prompts, out, *arguments):
    """Results and log of one engine in a process of its own."""
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(out), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    if "--tensor-parallel-size=2" in arguments:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "{}|{}".format(*CORES[:2])  # a core for each rank
    done = subprocess.run(
        command, input=json.dumps(prompts), env=environment, capture_output=True, text=True, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return json.loads(out.read_text(encoding="utf-8")), log


@pytest.fixture(scope="module")
def served(checkpoint, prompts, tmp_path_factory):
    """The engine's answers on one rank, and its log."""
    eager = [] if shutil.which("g++") else ["--enforce-eager"]
    return run_engine(checkpoint, prompts, tmp_path_factory.mktemp("one") / "out.json", *eager)


def reference_logprobs(checkpoint, ids):
    """Log-probabilities [len(ids), vocabulary] of the token after each one, by the reference model."""
    with torch.no_grad():
        logits = load_reference(checkpoint)(torch.tensor([ids]), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def test_prompt_logprobs_equal_the_reference(checkpoint, prompts, served):
    for ids, answer in zip(prompts, served[0], strict=True):
        expected = reference_logprobs(checkpoint, ids)[:-1]
        expected = expected.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer["logprobs"][1:]), expected, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_the_reference(checkpoint, prompts, served):
    for ids, answer in zip(prompts, served[0], strict=True):
        expected = reference_logprobs(checkpoint, ids + answer["tokens"])[len(ids) - 1 : -1]
        top = expected.topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 1e-3
        assert clear.sum() >= 12
        actual = torch.tensor(answer["tokens"])
        assert torch.equal(actual[clear], top.indices[:, 0][clear])


def test_log_names_scheme_backend_and_reason_once(served):
    assert served[1].count("FlatQuant w4a4: torch backend (no CUDA device)") == 1


@pytest.mark.skipif(len(CORES) < 2, reason="two ranks need two cores")
def test_two_ranks_give_the_tokens_of_one(checkpoint, prompts, served, tmp_path):
    answers, _ = run_engine(
        checkpoint, prompts, tmp_path / "out.json", "--tensor-parallel-size=2", "--enforce-eager"
    )
    assert [a["tokens"] for a in answers] == [a["tokens"] for a in served[0]]
    for one, two in zip(served[0], answers, strict=True):
        torch.testing.assert_close(
            torch.tensor(two["logprobs"][1:]), torch.tensor(one["logprobs"][1:]), rtol=0, atol=1e-4
        )
