"""Turn a trained block into numbers: rounded on-line factors, merged diagonals, weights to be rounded.

The runtime uses rounded numbers, so those are inverted, in float64 (docs/format.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.kron import kron_wide_ref
from .block import TrainableBlock, TrainableLinear
from .sites import Site


@dataclass
class FoldedBlock:
    """What a block becomes before its weights are rounded.

    tensors: transforms, clips (float32), norms and biases (the model's dtype) by checkpoint name
    relative to the block. weights: linear name -> clipped weight, float64 [out, in]. exact: the same before
    clipping, which computes what the original does.
    """

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    exact: dict[str, Tensor]


def round_factor(p: Tensor) -> Tensor:
    """The bf16 value of an on-line factor, in float64."""
    return p.detach().to(torch.bfloat16).double()


def inverse_transpose(p: Tensor) -> Tensor:
    """``P^-T`` of [..., n, n] in p's dtype."""
    return torch.linalg.inv(p).mT


def fold_norm(weight: Tensor, diag: Tensor) -> tuple[Tensor, Tensor]:
    """Merge a diagonal into a norm weight.

    weight: [K] in the model's dtype. diag: [K]. Returns the rounded product in weight's dtype, and the
    diagonal that it implies, float64 [K]. A channel whose product is not a usable number keeps d = 1.
    """
    merged = (weight.double() * diag.double()).to(weight.dtype)
    usable = torch.isfinite(merged) & (merged != 0) & (weight != 0)
    merged = torch.where(usable, merged, weight)
    safe = torch.where(usable, weight, torch.ones_like(weight)).double()
    implied = torch.where(usable, merged.double() / safe, torch.ones_like(safe))
    return merged, implied


def _fold_site(site: Site, name: str, tensors: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Store a site's tensors; return its (left^-T, right^-T) in float64."""
    left, _, right, _ = site.matrices()
    left_inv_t = right_inv_t = None
    if left is not None:
        left = round_factor(left)
        tensors[f"{name}.{'left' if right is not None else 'head'}"] = left.float()
        left_inv_t = inverse_transpose(left)
    if right is not None:
        right = round_factor(right)
        tensors[f"{name}.right"] = right.float()
        right_inv_t = inverse_transpose(right)
    if site.clip is not None:
        tensors[f"{name}.clip"] = site.clip.detach().float()
    return left_inv_t, right_inv_t


@torch.no_grad()
def fold_block(block: TrainableBlock, source: dict[str, Tensor]) -> FoldedBlock:
    """Fold a trained block.

    source: the block's original tensors in their stored dtype, by relative name.
    """
    block.forget()
    arch = block.arch
    tensors: dict[str, Tensor] = {}
    device = block.device
    down_diag = block.site("down").diag
    prefix = {
        "qkv": f"{arch.attention}.qkv_transform",
        "o": f"{arch.attention}.o_transform",
        "gate_up": f"{arch.mlp}.gate_up_transform",
        "down": f"{arch.mlp}.down_transform",
    }
    inverses: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    diags: dict[str, Tensor] = {}
    for name in block.sites:
        site = block.site(name)
        inverses[name] = _fold_site(site, prefix[name], tensors)
        if site.diag is not None:
            diags[name] = site.diag.double()
    inverses["o"] = (inverses["o"][0], block.value.input_inv_t(exact=True))
    for name, norm in (("qkv", arch.input_norm), ("gate_up", arch.post_norm)):
        weight = source[f"{norm}.weight"].to(device)
        if name in diags:
            weight, diags[name] = fold_norm(weight, diags[name])
        tensors[f"{norm}.weight"] = weight

    weights, exact = {}, {}
    for group, name in zip(arch.groups, block.sites, strict=True):
        for linear_name in group:
            linear: TrainableLinear = block.linear(linear_name)
            weight = source[f"{linear_name}.weight"].to(device).double()
            bias = source.get(f"{linear_name}.bias")
            if name in diags:
                weight = weight / diags[name]
            weight = kron_wide_ref(weight, *inverses[name])
            clipped = weight
            if linear.clip is not None:
                clipped = linear.clip(weight, block.recipe.group_size)
            if bias is not None:
                dtype, bias = bias.dtype, bias.to(device).double()
            if linear_name == arch.qkv[2]:
                p = block.value.matrix_of_rows()
                weight, clipped = block.value.rows(weight, p), block.value.rows(clipped, p)
                bias = block.value.rows(bias[:, None], p)[:, 0] if bias is not None else None
            if linear_name == arch.gate_up[1] and down_diag is not None:
                weight = weight * down_diag.double()[:, None]
                clipped = clipped * down_diag.double()[:, None]
                bias = bias * down_diag.double() if bias is not None else None
            weights[linear_name], exact[linear_name] = clipped, weight
            if bias is not None:
                tensors[f"{linear_name}.bias"] = bias.to(dtype)
    _fold_kv(block, tensors)
    covered = {*tensors, *(f"{n}.weight" for n in arch.linears)}
    tensors.update({n: t.to(device) for n, t in source.items() if n not in covered})
    return FoldedBlock(tensors, weights, exact)


def _fold_kv(block: TrainableBlock, tensors: dict[str, Tensor]) -> None:
    """Store P_h, its inverse transpose and the clips of the KV cache."""
    kv, prefix = block.kv, block.arch.attention
    if kv.k is not None and kv.k_clip is not None:
        p = kv.k()[0][0].detach().float()
        tensors[f"{prefix}.k_transform.matrix"] = p
        tensors[f"{prefix}.k_transform.inverse_t"] = inverse_transpose(p.double()).float()
        tensors[f"{prefix}.k_transform.clip"] = kv.k_clip().detach().float()
    if kv.v_clip is not None:
        tensors[f"{prefix}.v_transform.clip"] = kv.v_clip().detach().float()
