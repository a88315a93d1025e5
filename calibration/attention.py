"""A hook on queries, keys and values after RoPE, without forking any model.

One attention name, ``flatquant``, is registered with Transformers, and its mask with it: without the
mask entry Transformers passes no mask, which silently drops causality, windows and padding.
A module that has an attribute ``flatquant_qkv`` gets ``q, k, v = flatquant_qkv(q, k, v)``.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "flatquant"


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention on hooked inputs; query [B, H, T, D], key and value [B, KV, T, D]."""
    hook = getattr(module, "flatquant_qkv", None)
    if hook is not None:
        query, key, value = hook(query, key, value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and attention_mask is None and query.is_cuda and query.dtype == torch.float32:
        # PyTorch's fused float32 attention wants a key for every query head; the other form keeps [B, H, T, T].
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        module = SimpleNamespace(is_causal=module.is_causal)  # without groups to repeat again
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
