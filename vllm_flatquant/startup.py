"""What a start does for our layers: their kernels are compiled before anything needs them, and a line says so.

Which variants a layer needs follows from its sizes, so they are known when its parameters are made, long before its
weights have come. Each kind of layer goes through its kernels twice: first nothing starts, and what Triton's cache
lacks begins to compile in other processes; then, with the weights in place, every variant runs once. Compiling one
while vLLM captures a CUDA graph would be fatal, and slow in the first requests.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch

from . import _compat
from .kernels import ahead, jit


class Owner(Protocol):
    """A layer's quantization method, as far as start-up is concerned."""

    def kind(self, layer: Any) -> Hashable:
        """Equal for layers that need the same variants; None for one that needs none."""

    def stand_in(self, layer: Any) -> Any:
        """What ``run_kernels`` takes instead of ``layer``, whose weights have not come: memory without values."""

    def run_kernels(self, layer: Any) -> None:
        """Run every variant once."""


class StartUp:
    """The layers of this process whose weights have not come, and what was done for them."""

    def __init__(self) -> None:
        self._ahead = ahead.Ahead()
        self._last: tuple[Owner, Any] | None = None
        self._announced: set[Hashable] = set()
        self._warmed: set[Hashable] = set()
        self._open = 0
        self._ranks = 1
        self._reset()

    def _reset(self) -> None:
        self._layers = self._kernels = self._by_workers = self._here = 0
        self._kernel_seconds = self._weight_seconds = 0.0

    def created(self, owner: Owner, layer: Any, ranks: int = 1) -> None:
        """``owner`` has made the parameters of ``layer``. Kernels of the layer before, which is complete now (vLLM
        adds a bias later), begin to compile. ranks: how many processes of this host do the same."""
        self._open += 1
        self._ranks = ranks
        self._announce()
        self._last = owner, layer

    def _announce(self) -> None:
        if self._last is None:
            return
        (owner, layer), self._last = self._last, None
        kind = owner.kind(layer)
        if kind is None or kind in self._announced or not _device(layer).startswith("cuda"):
            return
        self._announced.add(kind)
        with self._counted(), jit.collecting(ahead.describe) as found:
            owner.run_kernels(owner.stand_in(layer))
        self._ahead.submit(list(found.values()), self._ranks)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Around what turns the weights of a layer from the checkpoint's layout into the kernels'; the host's time."""
        begin = time.perf_counter()
        yield
        self._weight_seconds += time.perf_counter() - begin

    def processed(self, owner: Owner, layer: Any) -> None:
        """The weights of ``layer`` are in place: its kernels run once, if it is the first of its kind."""
        self._open -= 1
        self._layers += 1
        kind = owner.kind(layer)
        if kind is not None and kind not in self._warmed:
            self._warmed.add(kind)
            before = jit.variants()
            with self._counted(), _listening(self._seen):
                self._announce()
                outcome = self._ahead.wait()
                self._by_workers += outcome.compiled
                for problem in outcome.problems:
                    _compat.logger.warning("FlatQuant: %s; it is compiled where it is needed", problem)
                owner.run_kernels(layer)
            self._kernels += jit.variants() - before
        if not self._open:
            self._last = None  # or it would stay in memory
            self._say()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        _synchronize()
        begin = time.perf_counter()
        yield
        _synchronize()
        self._kernel_seconds += time.perf_counter() - begin

    def _seen(self, cached: bool) -> None:
        self._here += not cached

    def _say(self) -> None:
        if self._kernels:
            _compat.logger.info(
                "FlatQuant: %d kernels ready in %.2f s (%d from cache%s)",
                self._kernels,
                self._kernel_seconds,
                max(0, self._kernels - self._by_workers - self._here),
                f", {self._here} compiled by this process" if self._here else "",
            )
        _compat.logger.info(
            "FlatQuant: weights of %d layers ready in %.2f s", self._layers, self._weight_seconds
        )
        self._reset()


def _device(layer: Any) -> str:
    return str(next(layer.parameters()).device)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _listening(seen: Callable[[bool], None]) -> Iterator[None]:
    """Call ``seen(whether it came from the cache)`` for each variant that Triton gets ready."""
    knobs = getattr(getattr(jit.triton, "knobs", None), "compilation", None)
    if not hasattr(knobs, "listener"):  # then what is compiled here counts as from the cache
        yield
        return
    assert knobs is not None
    others = knobs.listener

    def listen(**event: Any) -> None:
        seen(bool(event.get("cache_hit")))
        if others is not None:
            others(**event)

    knobs.listener = listen
    try:
        yield
    finally:
        knobs.listener = others


startup = StartUp()
