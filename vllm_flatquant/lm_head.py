"""The output head with 8-bit weights: vLLM's side. Off unless the checkpoint has one (``lm_head_bits``)."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from . import _compat
from ._compat import QuantizeMethodBase
from .dummy import fill_dummy
from .errors import UnsupportedError
from .kernels.w8_linear import TOKEN_BLOCKS, w8_linear, w8_linear_ref
from .loading import ExpectedTensors
from .startup import startup


class FlatQuantHeadMethod(QuantizeMethodBase):
    """An lm_head of int8 codes and one scale per row, split by vocabulary over tensor-parallel ranks."""

    def __init__(self, backend: str, prefix: str) -> None:
        self._backend = backend
        self._prefix = prefix

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
        """Register the checkpoint's tensors; rows that pad the vocabulary are zero."""
        if self._backend == "triton" and params_dtype == torch.float32:
            raise UnsupportedError(
                "FlatQuant's GPU kernels have no float32; serve with --dtype bfloat16"
            )
        self._dtype = params_dtype
        self._expected = ExpectedTensors(self._prefix)
        self._deployment = _compat.deployment()
        rows, vocabulary = output_partition_sizes[0], layer.org_vocab_size
        loader = extra_weight_attrs["weight_loader"]
        for name, columns, dtype in (
            ("weight_packed", input_size, torch.int8),
            ("weight_scale", 1, torch.float32),
        ):
            value = nn.Parameter(torch.zeros(rows, columns, dtype=dtype), requires_grad=False)
            value.output_dim = 0  # type: ignore[attr-defined]
            value.weight_loader = self._expected.checked(name, loader)  # type: ignore[attr-defined]
            layer.register_parameter(name, value)
            self._expected.expect(name, None, f"{self._prefix}.{name}", (vocabulary, columns), dtype)
        startup.created(self, layer, self._deployment.local_ranks)

    def check_loaded(self, layer: Any) -> None:
        """Raise CheckpointError naming each tensor of ``layer`` that the checkpoint lacks."""
        if self._deployment.loads_tensors:
            self._expected.require_all()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and run the kernel for every number of tokens that it serves."""
        if not hasattr(self, "_expected"):
            return  # a second call
        self.check_loaded(layer)
        if self._deployment.dummy:
            fill_dummy(layer)
        del self._expected
        for name in ("weight_packed", "weight_scale"):
            layer.register_parameter(name, nn.Parameter(getattr(layer, name).data, requires_grad=False))
        startup.processed(self, layer)

    def kind(self, layer: Any) -> Hashable:
        """As ``startup.Owner``."""
        if self._backend != "triton":
            return None
        codes = layer.weight_packed
        return "lm_head", tuple(codes.shape), self._dtype, layer.bias is None, codes.device

    def stand_in(self, layer: Any) -> Any:
        """As ``startup.Owner``: the layer's memory stays as it is."""
        return layer

    def run_kernels(self, layer: Any) -> None:
        """As ``startup.Owner``."""
        codes = layer.weight_packed
        for tokens in TOKEN_BLOCKS:
            x = torch.zeros(tokens, codes.shape[1], dtype=self._dtype, device=codes.device)
            self.apply(layer, x, layer.bias)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., hidden] -> logits [..., rows of this rank] in x's dtype."""
        product = w8_linear if self._backend == "triton" else w8_linear_ref
        flat = product(x.reshape(-1, x.shape[-1]), layer.weight_packed, layer.weight_scale, bias)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Never tied: the embedding keeps 16 bits."""
        raise UnsupportedError(
            "config.json has tie_word_embeddings, but an 8-bit lm_head is a copy of its own; "
            "quantize the model again"
        )
