"""What every operator file needs to hold a Triton kernel and its custom op: the guarded import and ``register``.

Importing this works without Triton and without a GPU; the references then still run.
"""

import inspect
import os
from collections.abc import Callable
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


def register(
    name: str, on_cuda: Callable[..., Any], on_cpu: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define the custom op ``flatquant::name`` once, with the schema of ``on_cuda``'s annotations.

    The op mutates nothing. A second call for the same name (a second copy of the module) does nothing.
    """
    if hasattr(torch.ops.flatquant, name):
        return
    assert inspect.signature(on_cuda).parameters.keys() == inspect.signature(on_cpu).parameters.keys()
    _LIBRARY.define(name + torch.library.infer_schema(on_cuda, mutates_args=()))
    _LIBRARY.impl(name, on_cuda if HAS_TRITON else _no_triton, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"flatquant::{name}", fake, lib=_LIBRARY)


def _no_triton(*args: object, **kwargs: object) -> None:
    raise RuntimeError("flatquant: the CUDA kernels need Triton; install it, or run on the CPU")


def hopper(device: torch.device) -> bool:
    """True on sm_90: the card with ``wgmma``, bulk prefetch and programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
