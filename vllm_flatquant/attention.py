"""Attention with a quantized KV cache: transform after RoPE, then quantize K and V per token and head.

Values are quantized and dequantized before they enter vLLM's ordinary cache, so any attention backend
works and results are those of a quantized cache; memory is not saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import _compat, ops
from ._compat import Attention, BaseKVCacheMethod
from .dummy import fill_dummy
from .errors import UnsupportedError
from .loading import ExpectedTensors
from .sites import ATTENTION_NAMES, attention_shapes, check_head_dim, checkpoint_name
from .spec import FlatQuantSpec

_PLAIN_CACHES = ("auto", "float16", "bfloat16", "half", "float32", "float")


class FlatQuantAttention(Attention):
    """vLLM's attention layer after FlatQuant's transform and quantization of q, k and v."""

    k_transform_matrix: Tensor | None
    k_transform_inverse_t: Tensor | None
    k_transform_clip: Tensor | None
    v_transform_clip: Tensor | None
    flatquant_bits: tuple[int, int]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query: [T, heads * head_dim]. key, value: [T, kv_heads * head_dim]. Result as vLLM's."""
        query, key, value = (x.flatten(1) for x in (query, key, value))
        if self.k_transform_clip is not None:
            matrix, inverse_t = self.k_transform_matrix, self.k_transform_inverse_t
            query = ops.head_transform(query, inverse_t, None, 16, self.head_size)
            key = ops.head_transform(
                key, matrix, self.k_transform_clip, self.flatquant_bits[0], self.head_size
            )
        if self.v_transform_clip is not None:
            value = ops.head_transform(
                value, None, self.v_transform_clip, self.flatquant_bits[1], self.head_size_v
            )
        return super().forward(query, key, value, *args, **kwargs)


class FlatQuantKVCacheMethod(BaseKVCacheMethod):
    """Gives an attention layer its K transform and clips, and makes it a FlatQuantAttention.

    vLLM builds this object twice per layer, so only ``create_weights`` has side effects.
    """

    def __init__(self, quant_config: Any, spec: FlatQuantSpec) -> None:
        super().__init__(quant_config)
        self._spec = spec

    def create_weights(self, layer: Any) -> None:
        """Register ``k_transform_*`` and ``v_transform_clip``. Raises UnsupportedError."""
        super().create_weights(layer)
        prefix = str(layer.layer_name)
        kind = type(layer)
        if kind is not Attention:
            raise UnsupportedError(
                f"{prefix} is a {kind.__name__}, for which FlatQuant has no quantized KV cache; "
                "quantize the model again with --kv 16"
            )
        self._expected = ExpectedTensors(prefix)
        self._deployment = _compat.deployment()
        kv = self._spec.kv
        check_head_dim(self._spec, int(layer.head_size), prefix)
        shapes = attention_shapes(self._spec)
        for name, tensor in ATTENTION_NAMES.items():
            if name not in shapes:
                layer.register_parameter(name, None)
                continue
            parameter = nn.Parameter(torch.empty(shapes[name], dtype=torch.float32), requires_grad=False)
            self._expected.expect(
                name, None, checkpoint_name(prefix, tensor), shapes[name], torch.float32
            )
            parameter.weight_loader = self._expected.checked(name, _copy)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        layer.flatquant_bits = (kv.k_bits, kv.v_bits)
        layer.__class__ = FlatQuantAttention

    def check_loaded(self, layer: Any) -> None:
        """Raise CheckpointError naming each tensor of ``layer`` that the checkpoint lacks."""
        if self._deployment.loads_tensors:
            self._expected.require_all()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises CheckpointError as ``check_loaded`` does."""
        super().process_weights_after_loading(layer)
        self.check_loaded(layer)
        if self._deployment.dummy:
            fill_dummy(layer)


def _copy(parameter: nn.Parameter, loaded: Tensor) -> None:
    parameter.data.copy_(loaded)


def check_cache_dtype(spec: FlatQuantSpec, cache_dtype: str) -> None:
    """Raise UnsupportedError if ``--kv-cache-dtype`` conflicts with the checkpoint or the device."""
    quantized = min(spec.kv.k_bits, spec.kv.v_bits) < 16
    if quantized and cache_dtype not in _PLAIN_CACHES:
        raise UnsupportedError(
            f"--kv-cache-dtype {cache_dtype} would quantize a second time what this checkpoint already "
            f"quantizes (K {spec.kv.k_bits} bits, V {spec.kv.v_bits} bits); leave it at auto"
        )
    # vLLM's CPU attention takes these silently and returns garbage; fp8 works there.
    if _compat.is_cpu() and cache_dtype not in (*_PLAIN_CACHES, "fp8", "fp8_e4m3", "fp8_e5m2"):
        raise UnsupportedError(
            f"--kv-cache-dtype {cache_dtype} gives wrong results on vLLM's CPU backend; leave it at auto"
        )
