"""Perplexity over non-overlapping windows."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .data import check_vocabulary
from .errors import UserError


def windows(tokens: Tensor, seq_len: int, limit: int | None = None) -> Tensor:
    """int64 [n] -> [count, seq_len]: the first ``limit`` whole windows; UserError if there is none."""
    count = len(tokens) // seq_len
    if count == 0:
        raise UserError(
            f"the text has {len(tokens)} tokens, fewer than one window of {seq_len}; give more text or lower "
            "--seq-len"
        )
    count = min(count, limit) if limit else count
    return tokens[: count * seq_len].view(count, seq_len)


def perplexity(model: PreTrainedModel, rows: Tensor, batch_size: int = 4) -> float:
    """``exp`` of the mean next-token cross entropy over the last seq_len - 1 tokens of each row.

    model: a Transformers causal LM. rows: int64 [count, seq_len].
    """
    return math.exp(token_losses(model, rows, batch_size).mean())


@torch.no_grad()
def token_losses(model: PreTrainedModel, rows: Tensor, batch_size: int = 4) -> Tensor:
    """Cross entropy (nats) of each token but the first of each row, float64 [count, seq_len - 1].

    Raises UserError if a token is outside the model's vocabulary.
    """
    device = next(model.parameters()).device
    embeddings: Any = model.get_input_embeddings()
    check_vocabulary(rows, embeddings.weight.shape[0])
    losses = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size].to(device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.double().cpu().view(len(batch), -1))
    return torch.cat(losses)
