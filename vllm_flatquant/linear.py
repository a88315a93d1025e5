"""Quantized linear layers: which parameters they have, how they load, how they are applied."""

from collections.abc import Hashable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from . import _compat, fusion
from ._compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    LinearMethodBase,
    PackedvLLMParameter,
    RowvLLMParameter,
    register_weight_loader_v2_supported_method,
)
from .backend import LayerShape, make_runtime
from .dummy import fill_dummy
from .errors import UnsupportedError
from .kernels.pack import packed_dtype, packed_shape, packing_step
from .loading import ExpectedTensors
from .sites import FACTOR_NAMES, Site, checkpoint_name, factor_name, factor_shapes
from .spec import FlatQuantSpec
from .startup import startup


@register_weight_loader_v2_supported_method
class FlatQuantLinearMethod(LinearMethodBase):
    """One quantized linear layer (fused q/k/v and gate/up count as one)."""

    def __init__(self, spec: FlatQuantSpec, site: Site, backend: str) -> None:
        self._spec = spec
        self._site = site
        self._backend = backend

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors as parameters of ``layer``.

        Raises UnsupportedError or CheckpointError if the layer's sizes cannot be served.
        """
        prefix, weights = str(layer.prefix), self._spec.weights
        local_outputs = sum(output_partition_sizes)
        group = weights.group_size or input_size
        step = packing_step(weights.bits)
        if input_size_per_partition % step or (weights.group_size and input_size_per_partition % group):
            raise UnsupportedError(
                f"{prefix} has {input_size_per_partition} inputs per tensor-parallel rank, not a multiple "
                + (
                    f"of weights.group_size {group}; serve with a smaller --tensor-parallel-size or "
                    "quantize with another group size"
                    if weights.group_size
                    else f"of {step}, as {weights.bits}-bit packing needs; serve with a smaller "
                    "--tensor-parallel-size"
                )
            )
        ranks = input_size // input_size_per_partition
        self._shape = LayerShape(
            input_size,
            output_size,
            input_size_per_partition,
            local_outputs,
            self._spec.shards // ranks if self._site.row_parallel else 1,
        )
        self._dtype = params_dtype
        self._runtime = make_runtime(self._spec, self._backend, self._shape, params_dtype)
        bits = self._spec.activations.bits
        self._fusion = None
        if fusion.active(self._backend, self._spec):
            self._fusion = fusion.WarmUp(self._site.name, bits, params_dtype, _compat.token_limit())
        self._expected = ExpectedTensors(prefix)
        self._deployment = _compat.deployment()

        parts = _compat.output_parts(layer)
        groups = input_size // group
        for (shard, rows), part in zip(parts, self._site.parts, strict=True):
            names = {kind: checkpoint_name(prefix, f"{part}.{kind}") for kind in _PART_TENSORS}
            packed, scale_shape = packed_shape(rows, input_size, weights.bits), (rows, groups)
            self._expected.expect(
                "weight_packed", shard, names["weight_packed"], packed, packed_dtype(weights.bits)
            )
            self._expected.expect(
                "weight_scale", shard, names["weight_scale"], scale_shape, torch.float32
            )
            self._expected.expect("bias", shard, names["bias"], (rows,), None)

        loader = extra_weight_attrs["weight_loader"]
        self._add_weights(layer, loader, local_outputs, input_size_per_partition, groups, input_size)
        self._add_factors(layer, loader, input_size, input_size_per_partition)
        # vLLM makes the bias after this call and gives it this loader.
        layer.weight_loader = self._expected.checked("bias", layer.weight_loader)
        startup.created(self, layer, self._deployment.local_ranks)

    def _add_weights(
        self, layer: Any, loader: Any, outputs: int, local_inputs: int, groups: int, inputs: int
    ) -> None:
        bits = self._spec.weights.bits
        packed = PackedvLLMParameter(
            data=torch.empty(packed_shape(outputs, local_inputs, bits), dtype=packed_dtype(bits)),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=Fraction(8, bits),
            weight_loader=self._expected.checked("weight_packed", loader),
        )
        layer.register_parameter("weight_packed", packed)
        scale_loader = self._expected.checked("weight_scale", loader)
        scale: BasevLLMParameter
        if self._spec.weights.group_size is None:
            data = torch.empty(outputs, 1, dtype=torch.float32)
            scale = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=scale_loader)
        else:
            local_groups = groups * local_inputs // inputs
            data = torch.empty(outputs, local_groups, dtype=torch.float32)
            scale = GroupQuantScaleParameter(
                data=data, output_dim=0, input_dim=1, weight_loader=scale_loader
            )
        layer.register_parameter("weight_scale", scale)

    def _add_factors(self, layer: Any, loader: Any, inputs: int, local_inputs: int) -> None:
        prefix = str(layer.prefix)
        shapes = factor_shapes(self._spec, self._site, prefix, inputs)
        ranks = inputs // local_inputs
        for name in FACTOR_NAMES:
            shape = shapes.get(name)
            if shape is None:
                layer.register_parameter(name, None)
                continue
            tensor = checkpoint_name(prefix, factor_name(self._site, name))
            self._expected.expect(name, None, tensor, shape, torch.float32)
            weight_loader = self._expected.checked(name, loader)
            # vLLM's loaders take a tensor that belongs to the whole fused module only for these classes.
            parameter: BasevLLMParameter
            if self._site.row_parallel:
                if shape[0] % ranks:
                    raise UnsupportedError(tensor_parallel_message(shape[0], ranks))
                data = torch.empty(shape[0] // ranks, *shape[1:], dtype=torch.float32)
                parameter = RowvLLMParameter(data=data, input_dim=0, weight_loader=weight_loader)
            else:
                data = torch.empty(shape, dtype=torch.float32)
                parameter = BasevLLMParameter(data=data, weight_loader=weight_loader)
            layer.register_parameter(name, parameter)

    def check_loaded(self, layer: Any) -> None:
        """Raise CheckpointError naming each tensor of ``layer`` that the checkpoint lacks."""
        if layer.bias is None:
            self._expected.forget("bias")
        if self._deployment.loads_tensors:
            self._expected.require_all()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came and turn the checkpoint's layout into the backend's.

        Raises CheckpointError naming each tensor that is missing.
        """
        if not hasattr(self, "_expected"):
            return  # a second call, on weights that are processed already
        self.check_loaded(layer)
        with startup.weights():
            if self._deployment.dummy:
                fill_dummy(layer)
            for name in FACTOR_NAMES:
                value = getattr(layer, name)
                if value is not None:
                    layer.register_parameter(name, nn.Parameter(value.data, requires_grad=False))
            packed, scale = layer.weight_packed.data, layer.weight_scale.data
            del layer.weight_packed, layer.weight_scale, self._expected
            self._runtime.process(layer, packed, scale)
        startup.processed(self, layer)

    def kind(self, layer: Any) -> Hashable:
        """As ``startup.Owner``."""
        if not self._runtime.tokens:
            return None
        factors = [getattr(layer, name) for name in FACTOR_NAMES]
        shapes = [None if factor is None else tuple(factor.shape) for factor in factors]
        scheme = self._spec.weights.bits, self._spec.activations.bits, self._dtype
        device = next(layer.parameters()).device
        tokens = tuple(self._runtime.tokens)  # another engine of this process may have more
        return (self._shape, *scheme, tokens, self._fusion, *shapes, self._bias(layer) is None, device)

    def stand_in(self, layer: Any) -> Any:
        """As ``startup.Owner``."""
        like = self._runtime.stand_in(layer)
        for name in ("bias", "skip_bias_add", "tp_rank", "input_size_per_partition"):
            setattr(like, name, getattr(layer, name))
        return like

    def _bias(self, layer: Any) -> Any:
        """What vLLM gives ``apply``: one rank adds the bias of a sum over ranks."""
        left_out = layer.skip_bias_add or (self._site.row_parallel and layer.tp_rank > 0)
        return None if left_out else layer.bias

    def run_kernels(self, layer: Any) -> None:
        """As ``startup.Owner``: what ``apply`` runs, and what graphs run instead of it."""
        factors = [f for f in (getattr(layer, name) for name in FACTOR_NAMES) if f is not None]
        if not factors:
            return  # nothing to transform or quantize: no kernel of ours
        bias = self._bias(layer)
        for count in self._runtime.tokens:
            shape = count, self._shape.local_inputs
            x = torch.zeros(shape, dtype=self._dtype, device=factors[0].device)
            self._runtime.kernels(layer, x, bias)
        if self._fusion is not None:
            self._fusion.run(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K] -> [..., N] in x's dtype; on this rank's part of K and N."""
        out = self._runtime.apply(layer, x.reshape(-1, x.shape[-1]), bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])


_PART_TENSORS = ("weight_packed", "weight_scale", "bias")


def tensor_parallel_message(shards: int, ranks: int) -> str:
    """Why ``ranks`` tensor-parallel ranks cannot serve ``shards`` transform blocks."""
    if shards == 1:
        return (
            f"this checkpoint was quantized with --shards 1 and serves with --tensor-parallel-size 1 only, "
            f"not {ranks}; quantize it again with `flatquant quantize --shards {ranks}`"
        )
    legal = ", ".join(str(n) for n in range(1, shards + 1) if shards % n == 0)
    return (
        f"--tensor-parallel-size {ranks} does not divide the {shards} shards of this checkpoint; use one of "
        f"{legal}, or quantize again with --shards {ranks}"
    )
