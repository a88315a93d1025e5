"""Round one folded block, group by group, and install the result into the layer."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.pack import pack_codes
from ..spec import FlatQuantSpec
from .architectures import Architecture
from .block import set_submodule
from .fold import FoldedBlock
from .recipe import Recipe
from .reference import ReferenceLinear, ReferenceSite, install_block
from .rounding import gptq, rtn
from .source import ModelSource
from .streams import batches


def round_block(
    layer: nn.Module,
    folded: FoldedBlock,
    recipe: Recipe,
    spec: FlatQuantSpec,
    source: ModelSource,
    x_q: Tensor,
    kwargs: dict[str, Any],
    device: torch.device,
) -> tuple[dict[str, Tensor], float | None]:
    """Round a folded block and install it into ``layer``; returns its checkpoint tensors and the damping.

    GPTQ goes through the groups in the order in which the block runs them, so that each sees the rounded
    ones before it.
    """
    arch: Architecture = source.arch
    sites = install_block(layer, folded.tensors, spec, arch, weights=folded.weights)
    tensors, highest = dict(folded.tensors), None
    scale_dtype = None
    if recipe.activation_bits == 16:
        scale_dtype = source.dtype if source.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    for group, name in zip(arch.groups, sites, strict=True):
        hessian = None
        if recipe.rounding == "gptq":
            hessian = accumulate_hessian(layer, sites[name], x_q, kwargs, recipe.batch_size, device)
        for linear in group:
            weight = folded.weights[linear]
            if hessian is None:
                codes, scale = rtn(weight, recipe.weight_bits, recipe.group_size, scale_dtype)
            else:
                codes, scale, damping = gptq(
                    weight,
                    hessian,
                    recipe.weight_bits,
                    recipe.group_size,
                    scale_dtype,
                    recipe.gptq_damping,
                    recipe.gptq_block,
                )
                highest = max(damping, highest or 0.0)
            tensors[f"{linear}.weight_packed"] = pack_codes(codes, recipe.weight_bits)
            tensors[f"{linear}.weight_scale"] = scale
            bias = folded.tensors.get(f"{linear}.bias")
            set_submodule(layer, linear, ReferenceLinear(sites[name], bias, codes, scale))
    return tensors, highest


@torch.no_grad()
def accumulate_hessian(
    layer: nn.Module,
    site: ReferenceSite,
    x: Tensor,
    kwargs: dict[str, Any],
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Sum of z^T z over the site's quantized inputs, float64 [K, K]."""
    total: list[Tensor] = []

    def observe(z: Tensor) -> None:
        product = (z.float().T @ z.float()).double()
        total[:] = [total[0] + product] if total else [product]

    site.observe = observe
    try:
        for batch in batches(x, batch_size, device):
            layer(batch, **kwargs)
    finally:
        site.observe = None
    return total[0]
