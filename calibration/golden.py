"""The norm and head behind the blocks, and the recorded prompt that they answer: what a checkpoint verifies itself by."""

import torch
from torch import Tensor, nn

from ..kernels.w8_linear import w8_linear_ref
from .head import HEAD, PACKED, SCALE
from .source import ModelSource, WeightFiles

GOLDEN_TOKENS = 64
GOLDEN_TOP = 8


@torch.no_grad()
def golden(
    source: ModelSource, files: WeightFiles, tokens: Tensor, hidden: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """A prompt and the finished model's top logits in float32, for ``flatquant inspect --verify``.

    files: the checkpoint's weights. tokens: int64 [T]. hidden: output of the last finished block [T, hidden].
    Returns input_ids int64 [n], top_ids int64 [n, 8] and top_logits float32 [n, 8], descending.
    """
    n = min(GOLDEN_TOKENS, len(tokens))
    states = final_norm(source, files, device)(hidden[:n].to(device))
    if PACKED in files:
        logits = w8_linear_ref(states, *(files.tensor(name).to(device) for name in (PACKED, SCALE)))
    else:
        logits = states @ files.tensor(head_name(source, files)).to(device, torch.float32).T
    top = logits.topk(min(GOLDEN_TOP, logits.shape[-1]))
    return {
        "input_ids": tokens[:n].clone(),
        "top_ids": top.indices.cpu(),
        "top_logits": top.values.cpu(),
    }


def norm_name(source: ModelSource) -> str:
    """Name of the weight of the norm before the head."""
    return f"{source.arch.blocks.rpartition('.')[0]}.norm.weight"


def embedding_name(source: ModelSource) -> str:
    """Name of the embedding."""
    return f"{source.arch.blocks.rpartition('.')[0]}.embed_tokens.weight"


def head_name(source: ModelSource, files: WeightFiles) -> str:
    """Name of the head's 16-bit weight: its own, or the embedding's."""
    return HEAD if HEAD in files else embedding_name(source)


@torch.no_grad()
def final_norm(source: ModelSource, files: WeightFiles, device: torch.device) -> nn.Module:
    """The norm before the head, in float32."""
    kind = type(source.model.model.norm)
    norm: nn.Module = kind(source.config.hidden_size, source.config.rms_norm_eps).to(device)
    norm.weight.copy_(files.tensor(norm_name(source)))  # type: ignore[operator]
    return norm
