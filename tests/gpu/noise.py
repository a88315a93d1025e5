"""How far engines in bf16 may be from each other: as far as rounding takes the reference, measured there.

With 4-bit activations a sum in another order moves codes, and a best token that led by several nats can change;
the largest such lead grows with the number of tokens. So no number is set: the same checkpoint on the same tokens
by the reference backend in float32 and in bf16 gives the leads of the tokens that change ("the noise"), and an
engine in bf16, compared with the same float32, may change about as many. All leads are in nats, in float32.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_flatquant.calibration.reference import load_reference

LEADS = (0.0, 1.0, 2.0, 4.0)
"""Changed tokens are counted whose lead is at least this."""
FACTOR = 1.25
"""An engine rounds at other places than the reference: its expected counts may be this many times the noise's. (The
reference in fp16, which rounds eight times as finely, changes 0.95 times as many tokens at 4 bits, as one moved code
moves others.)"""
LEAD_FACTOR = 1.5
"""The same of the largest lead, which scatters more."""
SIGMAS = 4.0
FLOOR = 0.25
"""Least delta: two units in the last place of a bf16 logit between 16 and 32."""


def load_both(folder: Path, device: str) -> tuple[Any, Any]:
    """The reference in bf16 and in float32."""
    return load_reference(folder, device, torch.bfloat16), load_reference(folder, device)


@torch.inference_mode()
def logprobs(model: Any, rows: Tensor) -> Tensor:
    """Log-probabilities [rows, length, vocabulary] float32 after each token of rows [rows, length]."""
    return model(rows.to(model.device), use_cache=False).logits.float().log_softmax(-1)


def changed_leads(exact: Tensor, tokens: Tensor) -> Tensor:
    """Leads [n] of the best tokens of log-probabilities ``exact`` [..., vocabulary] that ``tokens`` [...] are not."""
    top = exact.topk(2)
    differs = top.indices[..., 0] != tokens.to(exact.device)
    return (top.values[..., 0] - top.values[..., 1])[differs].cpu()


def counts(leads: Tensor) -> dict[float, int]:
    """How many of ``leads`` are at least each of LEADS."""
    return {least: int((leads >= least).sum()) for least in LEADS}


def most_changes(noise: int) -> float:
    """The most tokens that an engine may change where rounding alone changes ``noise`` of as many.

    Both counts n are taken as Poisson, the engine's with at most FACTOR times the noise's mean. sqrt(n + 3/8) then
    has a variance of 1/4 (Anscombe 1948), so the bound is where the engine's exceeds sqrt(FACTOR) times the noise's by SIGMAS
    standard deviations of their difference, sqrt(1 + FACTOR) / 2; chance exceeds it less than once in 2000 times.
    """
    root = (FACTOR * (noise + 3 / 8)) ** 0.5 + SIGMAS * (1 + FACTOR) ** 0.5 / 2
    return root**2 - 3 / 8


def delta(noise: Tensor) -> float:
    """Nats by which a best token must lead for every engine to have to agree. noise: leads [n] of changed tokens."""
    return max(FLOOR, LEAD_FACTOR * noise.max().item()) if len(noise) else FLOOR
