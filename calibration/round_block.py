"""Round one folded block, site by site, and install the result into the layer."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.pack import pack_codes
from ..spec import Activations, FlatQuantSpec, KVCache
from . import parallel
from .architectures import Architecture
from .block import set_submodule
from .errors import UserError
from .fold import FoldedBlock
from .magr import shrink_range
from .recipe import Recipe
from .reference import ReferenceLinear, ReferenceSite, install_block
from .rounding import gptq, prepare, qronos, rtn
from .source import ModelSource
from .streams import batches
from .weights import Grid


@dataclass
class RoundingReport:
    """How one site was rounded. damping: fractions tried, of which the last held. bound: ``Sweep.bound``."""

    damping: list[float]
    bound: float


class _Seen(Exception):
    """Ends a forward pass at the site that was waited for."""

    def __init__(self, inputs: Tensor):
        self.inputs = inputs


def _stop(inputs: Tensor) -> None:
    raise _Seen(inputs)


@dataclass
class Stream:
    """A layer with its sites in place, and the inputs [N, T, hidden] that it is run on."""

    layer: nn.Module
    sites: dict[str, ReferenceSite]
    x: Tensor

    @torch.no_grad()
    def inputs(self, site: str, batch: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the site's linears read for ``batch``, after transform and quantization, float32 [T, K]."""
        self.sites[site].observe = _stop
        try:
            self.layer(batch, **kwargs)
        except _Seen as seen:
            return seen.inputs.float()
        finally:
            self.sites[site].observe = None
        raise RuntimeError(f"the block does not run its {site} linears")


def round_block(
    layer: nn.Module,
    folded: FoldedBlock,
    recipe: Recipe,
    spec: FlatQuantSpec,
    source: ModelSource,
    x: Tensor,
    x_q: Tensor,
    kwargs: dict[str, Any],
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, RoundingReport]]:
    """Round a folded block and install it into ``layer``.

    x: full-precision stream [N, T, hidden], read by Qronos alone. x_q: stream of the quantized prefix. The
    sites are rounded in the order in which the block runs them, so that each sees the rounded ones before.
    Returns the block's checkpoint tensors and, by site, how it went. Raises UserError if the
    activations are not finite.
    """
    arch: Architecture = source.arch
    exact = None
    if recipe.rounding == "qronos":
        exact = exact_stream(layer, folded, spec, arch, x)
    sites = install_block(layer, folded.tensors, spec, arch, weights=as_float(folded.weights))
    rounded = Stream(layer, sites, x_q)
    tensors, reports = dict(folded.tensors), {}
    grid = Grid(
        recipe.weight_bits,
        recipe.group_size,
        source.scale_dtype if recipe.activation_bits == 16 else None,
        recipe.weight_scale == "search",
        recipe.weight_shrink,
    )
    for group, name in zip(arch.groups, sites, strict=True):
        # Rows that share an input are rounded together. Clipping decides the scale; what codes approximate is
        # the weight before it wherever errors can move on.
        weights = folded.weights if recipe.rounding == "rtn" else folded.exact
        weight, ranged = (torch.cat([w[linear] for linear in group]) for w in (weights, folded.weights))
        if recipe.needs_hessian:
            hessian, cross = accumulate(rounded, exact, name, kwargs, recipe.batch_size, device)
            if recipe.magr_alpha:
                weight = ranged = shrink_range(
                    weight, hessian, recipe.magr_alpha, recipe.magr_steps, recipe.group_size
                )
        scale = grid.scale(ranged)
        if recipe.rounding == "rtn":
            codes = rtn(weight, scale, grid.bits)
        else:
            try:
                sweep = prepare(hessian, *recipe.damping_used, recipe.column_order == "norm")
            except ArithmeticError as error:
                raise UserError(f"{name} inputs of a block: {error}") from None
            reports[name] = RoundingReport(sweep.tried, sweep.bound)
            if cross is None:
                codes = gptq(weight, scale, sweep, grid.bits, recipe.gptq_block)
            else:
                codes = qronos(weight, scale, sweep, cross, grid.bits, recipe.gptq_block)
        parallel.broadcast_(codes)
        parallel.broadcast_(scale)
        rows = [len(folded.weights[linear]) for linear in group]
        for linear, some, its_scale in zip(group, codes.split(rows), scale.split(rows), strict=True):
            tensors[f"{linear}.weight_packed"] = pack_codes(some, recipe.weight_bits).contiguous()
            tensors[f"{linear}.weight_scale"] = its_scale.contiguous()
            bias = folded.tensors.get(f"{linear}.bias")
            set_submodule(layer, linear, ReferenceLinear(sites[name], bias, some, its_scale))
    return tensors, reports


def as_float(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32, which the layers compute in."""
    return {name: weight.float() for name, weight in weights.items()}


def exact_stream(
    layer: nn.Module, folded: FoldedBlock, spec: FlatQuantSpec, arch: Architecture, x: Tensor
) -> Stream:
    """The folded block without any rounding, on the full-precision stream. ``layer`` is copied."""
    copied = copy.deepcopy(layer)
    update = {"activations": Activations(bits=16), "kv": KVCache()}
    sites = install_block(
        copied, folded.tensors, spec.model_copy(update=update), arch, weights=as_float(folded.exact)
    )
    return Stream(copied, sites, x)


def accumulate(
    rounded: Stream,
    exact: Stream | None,
    site: str,
    kwargs: dict[str, Any],
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """``(X~^T X~, X~^T X)`` of the site's inputs over all rows, float64 [K, K]; None without ``exact``."""
    hessian = cross = None
    goals = batches(exact.x, batch_size, device) if exact is not None else None
    for batch in batches(rounded.x, batch_size, device):
        z = rounded.inputs(site, batch, kwargs)
        product = z.T @ z
        hessian = product.double() if hessian is None else hessian.add_(product)
        if exact is not None and goals is not None:
            product = z.T @ exact.inputs(site, next(goals), kwargs)
            cross = product.double() if cross is None else cross.add_(product)
    assert hessian is not None
    parallel.sum_(hessian)
    if cross is not None:
        parallel.sum_(cross)
    return hessian, cross
