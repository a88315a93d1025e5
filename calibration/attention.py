"""A hook on queries, keys and values after RoPE, without forking any model.

One attention name, ``flatquant``, is registered with Transformers, and its mask with it: without the
mask entry Transformers passes no mask, which silently drops causality, windows and padding.
A module that has an attribute ``flatquant_qkv`` gets ``q, k, v = flatquant_qkv(q, k, v)``.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels.jit import multiprocessors

ATTENTION = "flatquant"
SQUARES = 2**29
"""Most bytes of [B, H, T, T] in training, where the plain form is the faster one."""
UNUSUAL = {"is_causal", "position_bias", "cache"}
"""Arguments of Transformers' attention function that ``FusedAttention`` does not have."""


class FusedAttention(torch.autograd.Function):
    """PyTorch's memory-efficient attention, with the same gradients each time.

    Its backward kernel divides the keys between programs, which add to the gradient of the queries in the order in which
    they come; with more than two parts a run does not repeat, and one that was interrupted ends with other bytes. Where
    algorithms must be deterministic it does not divide. That setting holds for the process, and cuBLAS refuses it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
    ) -> Tensor:
        """query, key, value: float32 [B, H, T, D] on a GPU. scale: of the products, by default D^-1/2. As query."""
        out, *kept = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.options = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Of query, key and value."""
        (gradient,) = gradients
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        query, key, value, *kept = ctx.saved_tensors
        causal, scale = ctx.options
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True)
        try:
            found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                gradient, query, key, value, None, *kept, 0.0, [True, True, True, False], causal, scale=scale
            )  # fmt: skip
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        return *found[:3], None, None


def plain_is_faster(query: Tensor) -> bool:
    """Whether ``FusedAttention`` would leave most of the GPU idle, and the squares that it avoids are small.

    Undivided, each head of a row is one program: 48 of them take 1.7 times the plain form's time on an H200, 128 as long.
    query: [B, H, T, D].
    """
    rows, heads, tokens, _ = query.shape
    few = 2 * rows * heads < multiprocessors(query.device)
    return few and 4 * rows * heads * tokens**2 <= SQUARES


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
    if attention_mask is None and query.is_cuda and query.dtype == torch.float32:
        if torch.is_grad_enabled() and plain_is_faster(query):
            with sdpa_kernel(SDPBackend.MATH):
                return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        # PyTorch's fused float32 attention wants a key for every query head; the other form keeps [B, H, T, T].
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        module = SimpleNamespace(is_causal=module.is_causal)  # without groups to repeat again
        usual = query.shape == key.shape and not kwargs.keys() & UNUSUAL and not kwargs.get("dropout")
        kind = SDPAParams(query, key, value, None, 0.0, module.is_causal, False)
        if usual and torch.is_grad_enabled() and can_use_efficient_attention(kind):
            out = FusedAttention.apply(query, key, value, module.is_causal, kwargs.get("scaling"))
            return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
