"""How a quantized linear layer is computed on the backend that ``choice.py`` names.

``triton``: our kernels, on CUDA devices from compute capability 8.0. Weights of 2 and 3 bits run as 4-bit
ones: right, and no smaller in memory. 8-bit weights, and 16-bit activations, go from our transform to
vLLM's own kernels. ``torch``: the reference functions, anywhere else. A layer carries, after
loading, ``transform_left``, ``transform_right`` and ``transform_clip`` (or None) and the weights below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _compat, ops
from .errors import UnsupportedError
from .kernels.pack import device_shape, pack_codes, repack_device, unpack_codes
from .kernels.quantize import dequantize_weight_ref
from .kernels.tiles import warmup_tokens
from .spec import FlatQuantSpec, Weights


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a linear layer: the whole input and output, and this rank's part with its scales a token."""

    inputs: int
    outputs: int
    local_inputs: int
    local_outputs: int
    local_shards: int = 1


class Runtime(Protocol):
    """The computation of one layer, made when the layer is.

    ``tokens``: the numbers of tokens for which ``kernels`` runs every variant of our kernels that the layer can need.
    """

    tokens: Sequence[int]

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        """Give ``layer`` its run-time weights. packed: as on disk. scale: float32 [N, groups]."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N] in x's dtype."""

    def kernels(self, layer: Any, x: Tensor, bias: Tensor | None) -> None:
        """The part of ``apply`` that runs on our kernels."""

    def stand_in(self, layer: Any) -> Any:
        """What ``kernels`` needs of ``layer`` as it will be after ``process``: memory of the right shapes, no values.

        layer: with the checkpoint's parameters.
        """


def make_runtime(spec: FlatQuantSpec, backend: str, shape: LayerShape, dtype: torch.dtype) -> Runtime:
    """The computation of ``spec``'s scheme on ``backend`` for a layer of ``shape`` in ``dtype``.

    Raises UnsupportedError if the backend cannot run the layer as labelled.
    """
    bits, weights = spec.activations.bits, spec.weights
    if backend == "torch":
        return IntegerTorch(bits, weights.bits) if bits < 16 else WeightOnlyTorch(weights.bits, dtype)
    if dtype == torch.float32:
        raise UnsupportedError("FlatQuant's GPU kernels have no float32; serve with --dtype bfloat16")
    if weights.bits < 4:
        _compat.logger.info_once(
            "FlatQuant %s: %d-bit weights take 4 bits of GPU memory each", spec.scheme, weights.bits
        )
    if bits == 16:
        return WeightOnlyTriton(weights, shape, dtype)
    return (
        Integer8(bits, shape, dtype) if weights.bits == 8 else IntegerTriton(bits, weights.bits, dtype)
    )


def _set(layer: Any, name: str, value: Tensor) -> None:
    """Register ``value`` as a plain parameter, which is what the compiler wants."""
    layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


class _OnTorch:
    """What compiles nothing."""

    tokens: Sequence[int] = ()

    def kernels(self, layer: Any, x: Tensor, bias: Tensor | None) -> None:
        pass

    def stand_in(self, layer: Any) -> Any:
        return layer


class _OnTriton:
    """A transform of ours, in the dtype of its input: so the kernels multiply it."""

    def __init__(self, dtype: torch.dtype, tokens: Sequence[int]) -> None:
        self._dtype = dtype
        self.tokens = tokens

    def _cast_factors(self, layer: Any) -> None:
        for name in ("transform_left", "transform_right"):
            factor = getattr(layer, name)
            if factor is not None:
                _set(layer, name, factor.data.to(self._dtype))

    def stand_in(self, layer: Any) -> Any:
        factors = {"transform_left": layer.transform_left, "transform_right": layer.transform_right}
        for name, factor in factors.items():
            factors[name] = None if factor is None else torch.empty_like(factor, dtype=self._dtype)
        return SimpleNamespace(**factors, transform_clip=layer.transform_clip)


class IntegerTorch(_OnTorch):
    """Integer weights and activations, through the reference functions."""

    def __init__(self, bits: int, weight_bits: int) -> None:
        self._bits = bits
        self._weight_bits = weight_bits

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        _set(layer, "weight_codes", unpack_codes(packed, self._weight_bits))
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


class WeightOnlyTorch(_OnTorch):
    """16-bit activations, weights dequantized once at load."""

    def __init__(self, weight_bits: int, dtype: torch.dtype) -> None:
        self._weight_bits = weight_bits
        self._dtype = dtype

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        codes = unpack_codes(packed, self._weight_bits)
        _set(layer, "weight", dequantize_weight_ref(codes, scale).to(self._dtype))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if layer.transform_left is not None or layer.transform_right is not None:
            x = ops.kron_torch(x, layer.transform_left, layer.transform_right)
        return F.linear(x, layer.weight, bias)


class IntegerTriton(_OnTriton):
    """Weights of up to 4 bits, int4 or int8 activations, through our kernels."""

    def __init__(self, bits: int, weight_bits: int, dtype: torch.dtype) -> None:
        from .kernels.kron_quant import kron_quant
        from .kernels.w4_gemm import w4_gemm

        super().__init__(dtype, warmup_tokens(_compat.token_limit()))
        self._bits = bits
        self._weight_bits = weight_bits
        self._kron_quant = kron_quant
        self._w4_gemm = w4_gemm

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        shards = layer.transform_clip.shape[0]
        _set(layer, "weight_device", repack_device(packed, self._weight_bits, shards))
        _set(layer, "weight_scale", scale)
        self._cast_factors(layer)

    def stand_in(self, layer: Any) -> Any:
        like, packed = super().stand_in(layer), layer.weight_packed
        columns = packed.shape[1] * 8 // self._weight_bits
        shape = device_shape(packed.shape[0], columns, layer.transform_clip.shape[0])
        like.weight_device = torch.empty(shape, dtype=torch.uint8, device=packed.device)
        like.weight_scale = layer.weight_scale
        return like

    def kernels(self, layer: Any, x: Tensor, bias: Tensor | None) -> None:
        self.apply(layer, x, bias)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = self._kron_quant(
            x, layer.transform_left, layer.transform_right, layer.transform_clip, self._bits
        )
        return self._w4_gemm(codes, scale, layer.weight_device, layer.weight_scale, bias, x.dtype)


class Integer8(_OnTriton):
    """8-bit weights and activations: our transform and quantization, then vLLM's int8 product."""

    def __init__(self, bits: int, shape: LayerShape, dtype: torch.dtype) -> None:
        from .kernels.kron_quant import kron_quant

        if shape.local_shards > 1:
            raise UnsupportedError(
                f"w8a8 on a GPU has one scale for each token, and this checkpoint gives a rank "
                f"{shape.local_shards}; serve with --tensor-parallel-size "
                f"{shape.local_shards * shape.inputs // shape.local_inputs} or quantize with --shards 1"
            )
        super().__init__(dtype, warmup_tokens(_compat.token_limit()))
        self._bits = bits
        self._kron_quant = kron_quant
        self._product = _compat.scaled_int8_product()

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        _set(layer, "weight_codes", packed)
        _set(layer, "weight_scale", scale)
        self._cast_factors(layer)

    def kernels(self, layer: Any, x: Tensor, bias: Tensor | None) -> None:
        self._quantized(layer, x)

    def _quantized(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._kron_quant(
            x, layer.transform_left, layer.transform_right, layer.transform_clip, self._bits
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = self._quantized(layer, x)
        return self._product(codes, layer.weight_codes.t(), scale, layer.weight_scale, x.dtype, bias)


class WeightOnlyTriton(_OnTriton):
    """16-bit activations: our transform, then vLLM's weight-only kernel for 4 or 8 bits."""

    def __init__(self, weights: Weights, shape: LayerShape, dtype: torch.dtype) -> None:
        from .kernels.kron import kron

        if shape.local_inputs % 8:
            raise UnsupportedError(
                f"a layer has {shape.local_inputs} inputs per tensor-parallel rank, which is not a "
                "multiple of 8; serve with a smaller --tensor-parallel-size"
            )
        super().__init__(dtype, [1])  # the transform's launch does not depend on the number of tokens
        self._kron = kron
        self._bits = weights.bits
        self._kernel = _compat.WeightOnlyKernel(
            (shape.inputs, shape.outputs),
            (shape.local_inputs, shape.local_outputs),
            max(4, weights.bits),
            weights.group_size,
            dtype,
        )

    def process(self, layer: Any, packed: Tensor, scale: Tensor) -> None:
        if self._bits < 4:
            packed = pack_codes(unpack_codes(packed, self._bits), 4)
        self._kernel.process(layer, packed, scale, self._dtype)
        self._cast_factors(layer)

    def kernels(self, layer: Any, x: Tensor, bias: Tensor | None) -> None:
        self._transformed(layer, x)  # vLLM warms its own kernel

    def _transformed(self, layer: Any, x: Tensor) -> Tensor:
        if layer.transform_left is None and layer.transform_right is None:
            return x
        return self._kron(x, layer.transform_left, layer.transform_right)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._kernel.apply(layer, self._transformed(layer, x), bias)
