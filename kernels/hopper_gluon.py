"""What the Gluon kernels for Hopper share: names that changed, dependent launch, descriptors of bulk copies.

Importing this fails where Triton has no Gluon; ``jit.has_gluon`` asks.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .jit import Unaligned

# Triton 3.6 to 3.9: the names changed, the operations did not.
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_async = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_buffer = gl.shared_memory_descriptor
reinterpret = _buffer.reinterpret if hasattr(_buffer, "reinterpret") else _buffer._reinterpret


@gluon.jit
def wait_for_inputs(PDL: gl.constexpr):
    """Until here nothing that an earlier kernel writes was touched; programmatic dependent launch."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def launch_dependents(PDL: gl.constexpr):
    """The next kernel may start; it waits for this one's results in ``wait_for_inputs``."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, False, 1
        )


_KNOWN: dict[tuple[Any, ...], TensorDescriptor] = {}


def descriptor(
    base: Tensor, rows: int, columns: int, block_rows: int, block_columns: int, swizzle: int
) -> TensorDescriptor:
    """Bulk loads or stores of blocks of ``base``'s memory, taken as [rows, columns].

    A descriptor's own checks take longer than a launch, so they are made once for each kind. Raises Unaligned.
    """
    if base.data_ptr() % 16:
        raise Unaligned
    key = base.dtype, columns, block_rows, block_columns, swizzle
    known = _KNOWN.get(key)
    if known is None:
        layout = gl.NVMMASharedLayout(
            swizzle_byte_width=swizzle, element_bitwidth=8 * base.element_size(), rank=2
        )
        block = [block_rows, block_columns]
        known = TensorDescriptor(base, [rows, columns], [columns, 1], block, layout)
        _KNOWN[key] = _with(known, None, [])
        return known
    return _with(known, base, [rows, columns])


def _with(known: TensorDescriptor, base: Tensor | None, shape: list[int]) -> TensorDescriptor:
    """A copy with another base and shape, unchecked."""
    made: TensorDescriptor = object.__new__(TensorDescriptor)
    made.__dict__.update(known.__dict__, base=base, shape=shape)
    return made
