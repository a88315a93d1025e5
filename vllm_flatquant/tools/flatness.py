"""How flat weights and activations are, before and after the transforms.

A channel's magnitude is its Frobenius norm: over tokens for an activation, over output rows for a weight
(FlatQuant, arXiv 2410.09426, figure 1). Flat means that all channels have about the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.architectures import find_architecture
from ..calibration.reference import ReferenceLinear
from ..kernels.kron import kron_wide_ref
from ..kernels.quantize import dequantize_weight_ref
from ..sites import SITE_NAMES


@dataclass
class Flatness:
    """One site of one block: magnitudes of its input channels, float64 [K], of activations and weights; and
    ``peak``, the mean over tokens of the largest absolute value by the root mean square."""

    activation: Tensor
    weight: Tensor
    peak: float


@torch.no_grad()
def measure_flatness(model: Any, rows: Tensor) -> dict[tuple[int, str], Flatness]:
    """(block, site) -> flatness of what the quantizers see in ``model`` (unquantized, or a checkpoint on the
    reference backend), on token rows int64 [n, seq_len]."""
    arch = find_architecture(model.config.model_type)
    blocks = model.get_submodule(arch.blocks)
    squares: dict[tuple[int, str], Tensor] = {}
    peaks: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for i, block in enumerate(blocks):
        for site, group in zip(SITE_NAMES, arch.groups, strict=True):

            def hook(linear: Any, inputs: tuple[Tensor, ...], key: tuple[int, str] = (i, site)) -> None:
                z = site_input(linear, inputs[0].flatten(0, -2)).double()
                squares[key] = squares.get(key, 0) + z.square().sum(0)
                rms = z.square().mean(1).sqrt().clamp(min=1e-30)
                peaks.setdefault(key, []).append(z.abs().amax(1) / rms)

            handles.append(block.get_submodule(group[0]).register_forward_pre_hook(hook))
    try:
        for row in rows:
            model(row[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        (i, site): Flatness(
            squares[i, site].sqrt().cpu(),
            torch.cat([site_weight(block.get_submodule(name)) for name in group]).norm(dim=0).cpu(),
            float(torch.cat(peaks[i, site]).mean()),
        )
        for i, block in enumerate(blocks)
        for site, group in zip(SITE_NAMES, arch.groups, strict=True)
    }


def site_input(linear: Any, x: Tensor) -> Tensor:
    """What is quantized of a linear's input x [T, K]: its transform, float32 [T, K]."""
    if not isinstance(linear, ReferenceLinear):
        return x
    return kron_wide_ref(x, linear.site[0].left, linear.site[0].right)


def site_weight(linear: Any) -> Tensor:
    """A linear's weight as it multiplies, float64 [out, K]."""
    if isinstance(linear, ReferenceLinear) and linear.weight is None:
        return dequantize_weight_ref(linear.codes, linear.scale).double()
    return linear.weight.double()
