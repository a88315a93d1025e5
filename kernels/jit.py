"""What every operator file needs to hold a Triton kernel and its custom op: the guarded import, ``register``, ``launch``.

Importing this works without Triton and without a GPU; the references then still run.
"""

import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the decorators and annotations below must still evaluate
    HAS_TRITON = False
    triton = SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda inner: inner))
    tl = SimpleNamespace(constexpr=None)

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_LIBRARY = torch.library.Library("flatquant", "FRAGMENT")
OPERATORS: dict[str, dict[str, Callable[..., Any]]] = {}
"""Name -> what ``register`` was given: the functions "cuda", "cpu" and "fake"."""


def register(
    name: str, on_cuda: Callable[..., Any], on_cpu: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define the custom op ``flatquant::name`` once, with the schema of ``on_cuda``'s annotations.

    The op mutates nothing. A second call for the same name (a second copy of the module) does nothing.
    """
    if hasattr(torch.ops.flatquant, name):
        return
    assert inspect.signature(on_cuda).parameters.keys() == inspect.signature(on_cpu).parameters.keys()
    OPERATORS[name] = {"cuda": on_cuda, "cpu": on_cpu, "fake": fake}
    _LIBRARY.define(name + torch.library.infer_schema(on_cuda, mutates_args=()))
    _LIBRARY.impl(name, on_cuda if HAS_TRITON else _no_triton, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"flatquant::{name}", fake, lib=_LIBRARY)


def _no_triton(*args: object, **kwargs: object) -> None:
    raise RuntimeError("flatquant: the CUDA kernels need Triton; install it, or run on the CPU")


@cache
def hopper(device: torch.device) -> bool:
    """True on sm_90: the card with ``wgmma``, bulk prefetch and programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_gluon(module: str) -> bool:
    """Whether this Triton has what that file of Gluon kernels needs (3.6 to 3.9 do); says so once if not."""
    try:
        import_module(f".{module}", __package__)
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning("flatquant: %s needs another Triton (%s)", module, error)
        return False
    return True


class Unaligned(ValueError):
    """Memory that bulk loads cannot take: it does not start at a multiple of 16 bytes."""

    def __init__(self) -> None:
        super().__init__(
            "flatquant: this kernel takes memory that starts at a multiple of 16 bytes only"
        )


_COMPILED: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
_PERSISTENT: list[torch.Tensor] = []
_local = threading.local()
Take = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)``, with less work on the host once that variant is compiled.

    args: what the kernel takes when it runs. meta: its compile-time arguments, which come after those in its
    signature, and Triton's options; hashable. A prefill has no CUDA graph, so that a step of it on a fast
    GPU can have to wait for the host: docs/decisions.md. RuntimeError if the first argument is on another GPU
    than the current one.
    """
    if INTERPRET:
        kernel[grid](*args, **meta)
        return
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0].base  # of a TensorDescriptor
    current = check_device(first.get_device())
    key = (id(kernel), current, *meta.values(), *map(_specialization, args))
    found = _COMPILED.get(key)
    if found is None:
        collected = getattr(_local, "collected", None)
        if collected is not None:
            if key not in collected[0]:
                collected[0][key] = collected[1](kernel, args, meta)
            return
        compiled = kernel[grid](*args, **meta)
        found = compiled, [meta[name] for name in kernel.arg_names[len(args) :]]
        _COMPILED[key] = found
    else:
        found[0][(*grid, 1, 1)](*args, *found[1])
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        tokens = kernel.arg_names.index("t") if "t" in kernel.arg_names else None
        recorder.launched(found[0], grid, [*args, *found[1]], tokens)


def check_device(index: int) -> int:
    """The current GPU, on whose stream kernels start; RuntimeError if ``index`` is another. -1: memory of the CPU."""
    current = torch.cuda.current_device()
    if index not in (current, -1):
        raise RuntimeError(
            f"flatquant: the tensors are on cuda:{index}, the current device is cuda:{current}; "
            f"call the operator inside `with torch.cuda.device({index}):`"
        )
    return current


STEP, EXACT = 64, 256
"""``room``: what rows are rounded up to, and beyond how many tokens."""


def room(tokens: int) -> int:
    """Rows that a call on so many tokens is laid out for.

    Grids, descriptors and memory follow this number, and nothing but a kernel's argument ``t`` follows the tokens: so
    a recording (``replay.py``) serves every number of tokens with the same room. Up to 256, where CUDA graphs are made
    and a row counts, it is the number itself. Token tiles of products are multiples of 64 beyond.
    """
    return tokens if tokens <= EXACT else -(-tokens // STEP) * STEP


def leading(block: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first rows of memory that has room for more."""
    return block if block.shape[0] == tokens else block[:tokens]


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``: where an operator gets the memory of its results and of what lies between its kernels."""
    made = torch.empty(shape, dtype=dtype, device=device)
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.allocated(made)
    return made


def persistent(tensor: torch.Tensor) -> torch.Tensor:
    """Say that ``tensor`` stays where it is as long as the process lives."""
    _PERSISTENT.append(tensor)
    return tensor


def is_persistent(address: int) -> bool:
    """Whether ``address`` lies in such a tensor."""
    return any(0 <= address - x.data_ptr() < x.numel() * x.element_size() for x in _PERSISTENT)


@contextmanager
def recording(recorder: Any) -> Iterator[None]:
    """Tell ``recorder`` of every ``launch`` and ``empty`` of this thread."""
    _local.recorder = recorder
    try:
        yield
    finally:
        _local.recorder = None


@contextmanager
def collecting(take: Take) -> Iterator[dict[Any, Any]]:
    """In this thread, start no kernel that is not compiled yet. Gives a dict that each such variant joins once, as
    ``take(kernel, arguments, compile-time arguments)``; operators return memory without values."""
    found: dict[Any, Any] = {}
    _local.collected = found, take
    try:
        yield found
    finally:
        _local.collected = None


def variants() -> int:
    """How many compiled kernels this process has, be they new or from Triton's cache."""
    return len({id(compiled) for compiled, _ in _COMPILED.values()})


def _specialization(argument: Any) -> Any:
    """All that Triton's choice of a compiled variant looks at in a run-time argument."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument.bit_length() > 31
    if isinstance(argument, float):
        return float
    # A TensorDescriptor, whose copies (hopper_gluon.py) share one layout object.
    return id(argument.layout), *argument.block_shape
