"""Bytes of tensors that are alive, counted as operators make them and as they are dropped: on a CPU, or with fake
tensors, what a GPU's allocator would hold at its peak (without workspaces and fragmentation)."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators inside return, until nothing holds them.

    now, peak: bytes. at_peak: number of living storages of each size at the peak. What an operator uses
    inside itself is not seen; storages from before count only with ``hold``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: Counter[int] = Counter()
        self.at_peak: Counter[int] = Counter()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def hold(self, *tensors: Tensor) -> None:
        """Count these tensors from here on."""
        for storage in {t.untyped_storage() for t in tensors}:
            if storage in self._known:
                continue
            size = storage.nbytes()
            self._known.add(storage)
            weakref.finalize(storage, self._drop, size)
            self.now += size
            self.sizes[size] += 1
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, +self.sizes

    def _drop(self, size: int) -> None:
        self.now -= size
        self.sizes[size] -= 1

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = (t for t in tree_leaves(out) if isinstance(t, Tensor))
        self.hold(*(t for t in made if t.untyped_storage() not in given))
        return out
