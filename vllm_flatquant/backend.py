"""How a quantized linear layer is computed on the backend that ``choice.py`` names.

``triton``: our kernels, on CUDA devices from compute capability 8.0 (w4a16: our transform, then vLLM's
own 4-bit weight kernel). ``torch``: the reference functions, anywhere else. A layer carries, after
loading, ``transform_left``, ``transform_right`` and ``transform_clip`` (or None) and the weights below.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _compat, ops
from .errors import UnsupportedError
from .kernels.pack import unpack_int4
from .kernels.quantize import dequantize_weight_ref
from .kernels.tiles import warmup_tokens
from .spec import FlatQuantSpec


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a linear layer: the whole input and output, and this rank's part."""

    inputs: int
    outputs: int
    local_inputs: int
    local_outputs: int


class Runtime(Protocol):
    """The computation of one layer, made when the layer is."""

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        """Give ``layer`` its run-time weights. packed: uint8 [N, K/2]. scale: float32 [N, groups]."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N] in x's dtype."""


def make_runtime(spec: FlatQuantSpec, backend: str, shape: LayerShape, dtype: torch.dtype) -> Runtime:
    """The computation of ``spec``'s scheme on ``backend`` for a layer of ``shape`` in ``dtype``.

    Raises UnsupportedError if the backend cannot run the layer as labelled.
    """
    integer = spec.activations.bits < 16
    if backend == "torch":
        return IntegerTorch(spec.activations.bits) if integer else WeightOnlyTorch(dtype)
    if dtype == torch.float32:
        raise UnsupportedError("FlatQuant's GPU kernels have no float32; serve with --dtype bfloat16")
    if integer:
        return IntegerTriton(spec.activations.bits, dtype)
    return WeightOnlyTriton(spec.weights.group_size, shape, dtype)


def _set(layer: Any, name: str, value: Tensor) -> None:
    """Register ``value`` as a plain parameter, which is what the compiler wants."""
    layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _cast_factors(layer: Any, dtype: torch.dtype) -> None:
    """Give the kernels factors in the dtype of their input, as they multiply them."""
    for name in ("transform_left", "transform_right"):
        factor = getattr(layer, name)
        if factor is not None:
            _set(layer, name, factor.data.to(dtype))


_warmed: set[Any] = set()


def _warm_up(
    runtime: Runtime, layer: Any, key: Any, inputs: int, dtype: torch.dtype, tokens: int
) -> None:
    """Run ``layer`` once for every token count that has a tile of its own, up to ``tokens``.

    Compiling a kernel while vLLM captures a CUDA graph would be fatal, and slow in the first requests.
    """
    factors = [None if f is None else f.shape for f in (layer.transform_left, layer.transform_right)]
    device = next(layer.parameters()).device
    bias = getattr(layer, "bias", None)
    key = (type(runtime), key, *factors, bias is None, dtype, str(device))
    if key in _warmed:
        return
    _warmed.add(key)
    for count in warmup_tokens(tokens):
        runtime.apply(layer, torch.zeros(count, inputs, dtype=dtype, device=device), bias)


class IntegerTorch:
    """Int4 weights, int4 or int8 activations, through the reference functions."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        _set(layer, "weight_codes", unpack_int4(packed))
        _set(layer, "weight_scale", scale)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_torch(
            x,
            layer.transform_left,
            layer.transform_right,
            layer.transform_clip,
            self._bits,
            layer.weight_codes,
            layer.weight_scale,
            bias,
        )


class WeightOnlyTorch:
    """16-bit activations, weights dequantized once at load."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        _set(layer, "weight", dequantize_weight_ref(unpack_int4(packed), scale).to(self._dtype))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if layer.transform_left is not None or layer.transform_right is not None:
            x = ops.kron_torch(x, layer.transform_left, layer.transform_right)
        return F.linear(x, layer.weight, bias)


class IntegerTriton:
    """Int4 weights, int4 or int8 activations, through our kernels."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        from .kernels.kron_quant import kron_quant
        from .kernels.w4_gemm import w4_gemm

        self._bits = bits
        self._dtype = dtype
        self._tokens = _compat.token_limit()
        self._kron_quant = kron_quant
        self._w4_gemm = w4_gemm

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        from .kernels.pack import pack_device

        shards = layer.transform_clip.shape[0]
        _set(layer, "weight_device", pack_device(unpack_int4(packed), shards))
        _set(layer, "weight_scale", scale)
        _cast_factors(layer, self._dtype)
        key = (packed.shape, shards, self._bits)
        _warm_up(self, layer, key, packed.shape[1] * 2, self._dtype, self._tokens)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = self._kron_quant(
            x, layer.transform_left, layer.transform_right, layer.transform_clip, self._bits
        )
        return self._w4_gemm(codes, scale, layer.weight_device, layer.weight_scale, bias, x.dtype)


class WeightOnlyTriton:
    """16-bit activations: our transform, then vLLM's 4-bit weight kernel."""

    def __init__(self, group_size: int | None, shape: LayerShape, dtype: torch.dtype) -> None:
        from .kernels.kron import kron

        if shape.local_inputs % 8:
            raise UnsupportedError(
                f"a layer has {shape.local_inputs} inputs per tensor-parallel rank, which is not a "
                "multiple of 8; serve with a smaller --tensor-parallel-size"
            )
        self._kron = kron
        self._dtype = dtype
        self._kernel = _compat.WeightOnlyKernel(
            (shape.inputs, shape.outputs), (shape.local_inputs, shape.local_outputs), group_size, dtype
        )

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        self._kernel.process(layer, packed, scale, self._dtype)
        _cast_factors(layer, self._dtype)
        # The transform's launch does not depend on the number of tokens; vLLM warms its own kernel.
        _warm_up(self, layer, packed.shape, packed.shape[1] * 2, self._dtype, tokens=1)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if layer.transform_left is not None or layer.transform_right is not None:
            x = self._kron(x, layer.transform_left, layer.transform_right)
        return self._kernel.apply(layer, x, bias)
