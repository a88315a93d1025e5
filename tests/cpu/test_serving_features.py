"""Prefix caching, chunked prefill and speculative decoding (n-gram, draft model) take place and give the
reference's tokens.

Three engine starts.
"""

import json
import re

import pytest
import torch

from .test_serving_engine import reference_logprobs, run_engine
from .tiny_checkpoint import VOCAB, Recipe, write_checkpoint

BLOCK, CHUNK = 32, 64  # vLLM's CPU default is blocks of 128 tokens, which short prompts never fill
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No process of its own for the engine's core: it starts sooner."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """W4A4 with an 8-bit KV cache, float32."""
    folder = tmp_path_factory.mktemp("served")
    write_checkpoint(folder, Recipe(k_bits=8, v_bits=8))
    return folder


def serve(folder, prompts, place, **options):
    """Greedy tokens, the engine's metrics by name, and its log; at most two requests run at a time."""
    options |= {"block_size": BLOCK, "max_model_len": 256, "enable_prefix_caching": True}
    answers, log = run_engine(
        folder,
        prompts,
        place / "out.json",
        "--enforce-eager",
        "--max-num-seqs=2",
        "--max-tokens=40",
        f"--metrics={place / 'metrics.json'}",
        f"--options={json.dumps(options)}",
    )
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    return [answer["tokens"] for answer in answers], metrics, log


def check_tokens(folder, prompts, answers):
    """Every token is the reference's best one, wherever that leads by more than the engines' rounding."""
    for ids, tokens in zip(prompts, answers, strict=True):
        top = reference_logprobs(folder, ids + tokens)[len(ids) - 1 : -1].topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 1e-3
        assert clear.sum() >= 35
        assert torch.equal(torch.tensor(tokens)[clear], top.indices[:, 0][clear])


def check_drafts(metrics):
    """Some drafts were accepted, and some not."""
    drafted, accepted = (
        metrics[f"vllm:spec_decode_num_{what}_tokens"]["value"] for what in ("draft", "accepted")
    )
    assert drafted > accepted >= 10


def test_prefix_caching_and_chunked_prefill(checkpoint, tmp_path):
    torch.manual_seed(2)
    long, short = (torch.randint(2, VOCAB, (n,)).tolist() for n in (170, 40))
    same_start = long[: 3 * BLOCK] + short
    prompts = [long, short, same_start, long]
    answers, metrics, log = serve(
        checkpoint,
        prompts,
        tmp_path,
        enable_chunked_prefill=True,
        max_num_batched_tokens=CHUNK,
        enable_logging_iteration_details=True,
    )
    check_tokens(checkpoint, prompts, answers)
    # Three blocks for the shared start, and the whole blocks of the prompt that comes again.
    hits = metrics["vllm:prefix_cache_hits"]["value"]
    assert hits == 3 * BLOCK + len(long) // BLOCK * BLOCK
    counts = re.findall(r"Iteration\(\d+\): .* (\d+) context tokens, .* (\d+) generation tokens", log)
    steps = [(int(prefill), int(decode)) for prefill, decode in counts]
    assert sum(prefill for prefill, _ in steps) == sum(map(len, prompts)) - hits
    assert max(prefill + decode for prefill, decode in steps) == CHUNK < len(long)
    assert any(prefill and decode for prefill, decode in steps)  # a piece beside another's decoding


def test_ngram_speculation(checkpoint, tmp_path):
    torch.manual_seed(3)
    prompts = [torch.randint(2, VOCAB, (n,)).tolist() * 4 for n in (5, 12, 20)]
    answers, metrics, _ = serve(checkpoint, prompts, tmp_path, speculative_config=NGRAM)
    check_tokens(checkpoint, prompts, answers)
    check_drafts(metrics)


def test_a_draft_model_of_another_scheme(checkpoint, tmp_path):
    """The same random model in both, the draft with 8-bit activations and one layer in 16 bits."""
    draft = tmp_path / "draft"
    write_checkpoint(draft, Recipe(bits=8, ignore=("lm_head", "model.layers.1.mlp.down_proj")))
    torch.manual_seed(3)
    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in (5, 12, 70)]
    speculation = {"model": str(draft), "num_speculative_tokens": 3}
    answers, metrics, log = serve(checkpoint, prompts, tmp_path, speculative_config=speculation)
    check_tokens(checkpoint, prompts, answers)
    check_drafts(metrics)
    for scheme in ("w4a4", "w4a8"):
        assert log.count(f"FlatQuant {scheme}: torch backend") == 1
