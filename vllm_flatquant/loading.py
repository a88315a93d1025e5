"""Strict loading. vLLM does not notice a tensor that a quantized model's checkpoint lacks, nor one whose
shape is too large, so each layer keeps a list of what must arrive and checks what does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

ShardId = str | int | None
"""Which part of a fused module a tensor belongs to, in vLLM's words: "q", "k", "v", 0, 1, or None."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class ExpectedTensors:
    """The checkpoint tensors of one layer: what must come, in which shape, and what has come."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._names: dict[tuple[str, ShardId], str] = {}
        self._shapes: dict[tuple[str, ShardId], tuple[int, ...]] = {}
        self._dtypes: dict[tuple[str, ShardId], tuple[torch.dtype, ...]] = {}
        self._loaded: set[tuple[str, ShardId]] = set()

    def expect(
        self,
        parameter: str,
        shard: ShardId,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
    ) -> None:
        """Say that ``name`` fills ``parameter``; the checkpoint's whole ``shape``; None: any float."""
        self._names[parameter, shard] = name
        self._shapes[parameter, shard] = shape
        self._dtypes[parameter, shard] = _FLOATS if dtype is None else (dtype,)

    def forget(self, parameter: str) -> None:
        """Expect ``parameter`` no longer (a bias that the model turned out not to have)."""
        for key in [key for key in self._names if key[0] == parameter]:
            del self._names[key]

    def checked(self, parameter: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's weight loader for ``parameter``, with our checks before it."""

        def load(param: torch.nn.Parameter, loaded: Tensor, *shard: Any) -> Any:
            self._check(parameter, shard[0] if shard else None, loaded)
            return (
                loader(param, loaded, *shard)
                if shard and shard[0] is not None
                else loader(param, loaded)
            )

        return load

    def _check(self, parameter: str, shard: ShardId, loaded: Tensor) -> None:
        key = (parameter, shard)
        name = self._names.get(key)
        if name is None:
            raise CheckpointError(
                f"{self.layer}: unexpected tensor for {parameter}; quantize the model again, "
                "the checkpoint must name q, k, v, gate and up separately"
            )
        if tuple(loaded.shape) != self._shapes[key]:
            raise CheckpointError(
                f"{name} has shape {list(loaded.shape)} but the model needs {list(self._shapes[key])}; "
                "config.json and the tensors do not belong together, quantize the model again"
            )
        if loaded.dtype not in self._dtypes[key]:
            raise CheckpointError(
                f"{name} is {loaded.dtype} but must be {self._dtypes[key][0]}; quantize the model again"
            )
        if loaded.is_floating_point() and not bool(torch.isfinite(loaded).all()):
            raise CheckpointError(f"{name} contains NaN or inf; quantize the model again")
        self._loaded.add(key)

    def require_all(self) -> None:
        """Raise CheckpointError naming every tensor that did not come."""
        missing = [name for key, name in self._names.items() if key not in self._loaded]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}; download it again or quantize the model again"
            )
