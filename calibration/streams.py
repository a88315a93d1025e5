"""Calibration activations: the full-precision stream and the stream of the quantized prefix."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .source import ModelSource


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with and passes the input on."""

    def __init__(self, layer: nn.Module, last: bool):
        super().__init__()
        self.last = last
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        if self.last:
            raise _Stop
        return hidden_states


class _Stop(Exception):
    """Ends the recording forward pass before the final norm."""


def record_inputs(
    source: ModelSource, tokens: Tensor, device: torch.device
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Input of the first block, float32 [N, T, hidden] on the CPU, and every block's other arguments.

    tokens: int64 [N, T]. The arguments (masks, RoPE tables) are those of one row; they broadcast.
    """
    model = source.model
    blocks: nn.ModuleList = model.get_submodule(source.arch.blocks)
    recorders = [_Recorder(b, i == len(blocks) - 1) for i, b in enumerate(blocks)]
    embedding = source.files.tensor(f"{source.arch.blocks.rpartition('.')[0]}.embed_tokens.weight")
    if int(tokens.max()) >= embedding.shape[0] or int(tokens.min()) < 0:
        raise UserError(
            f"token ids run from {int(tokens.min())} to {int(tokens.max())} but the model's vocabulary has "
            f"{embedding.shape[0]} entries; tokenize with this model's tokenizer"
        )
    hidden = embedding[tokens].float()
    model.model.layers = nn.ModuleList(recorders)
    model.model.rotary_emb.to(device)
    try:
        model.model(inputs_embeds=hidden[:1].to(device), use_cache=False)
    except _Stop:
        pass
    finally:
        model.model.layers = blocks
    return hidden, [r.kwargs for r in recorders]


def batches(x: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Consecutive slices of ``x`` [N, ...] on ``device``."""
    for start in range(0, len(x), size):
        yield x[start : start + size].to(device, non_blocking=True)


@torch.no_grad()
def run_block(
    layer: nn.Module, x: Tensor, kwargs: dict[str, Any], batch_size: int, device: torch.device
) -> Tensor:
    """The layer's output for every row of ``x`` [N, T, hidden], on x's device."""
    out = torch.empty_like(x)
    for i, batch in enumerate(batches(x, batch_size, device)):
        out[i * batch_size : i * batch_size + len(batch)] = layer(batch, **kwargs)
    return out
