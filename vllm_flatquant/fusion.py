"""Compiled graphs: what comes before a transform joins its kernel, without a user flag.

    rms_norm, kron_quant             -> rmsnorm_kron_quant
    fused_add_rms_norm, kron_quant   -> rmsnorm_kron_quant, with the residual
    silu(gate) * up, kron_quant      -> silu_mul_kron_quant

with 16-bit activations likewise kron -> rmsnorm_kron and silu_mul_kron; and then operators of ours that follow
each other become one call (``chaining.py``).

A pass over the post-grad graph of the compiler, in vLLM's public slot for one, so that its ``uuid`` is in
every cache key. It looks at the producer of each transform's input and leaves alone what it does not know:
a value with a second consumer, another activation, a norm over a part of its input, a norm in fp16 before
a quantization (that kernel transforms what is not normed yet, which can be beyond 65504).
``VLLM_FLATQUANT_FUSION=0`` turns it off. Without the compiler (``--enforce-eager``) nothing is fused.
"""

import hashlib
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import _compat
from .chaining import chain_operators
from .errors import UnsupportedError
from .kernels import kron, kron_quant  # noqa: F401 (they define the operators that are looked for)
from .kernels.rmsnorm_kron import rmsnorm_kron
from .kernels.rmsnorm_kron_quant import rmsnorm_kron_quant
from .kernels.silu_mul_kron import silu_mul_kron
from .kernels.silu_mul_kron_quant import silu_mul_kron_quant
from .kernels.tiles import warmup_tokens
from .spec import FlatQuantSpec

SWITCH = "VLLM_FLATQUANT_FUSION"
_OPS = torch.ops.flatquant
_FUSED = {  # what is looked for: what it becomes behind a norm, and behind an activation
    "flatquant::kron_quant": (_OPS.rmsnorm_kron_quant.default, _OPS.silu_mul_kron_quant.default),
    "flatquant::kron": (_OPS.rmsnorm_kron.default, _OPS.silu_mul_kron.default),
}
_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view")
_FROM_END = 2**63 - 1


@dataclass(frozen=True)
class Fused:
    """What became of the transforms of a graph: fused with a norm, with an activation, or on their own."""

    norms: int = 0
    activations: int = 0
    alone: int = 0

    def __add__(self, other: "Fused") -> "Fused":
        return Fused(
            self.norms + other.norms, self.activations + other.activations, self.alone + other.alone
        )

    def __bool__(self) -> bool:
        return self != Fused()

    def __str__(self) -> str:
        return (
            f"{self.norms} RMSNorm and {self.activations} SiLU*mul fused with the transform after them, "
            f"{self.alone} transforms on their own"
        )


def active(backend: str, spec: FlatQuantSpec) -> bool:
    """Whether the run that is being built fuses: kernels and something for it, compiled graphs, and not switched off.

    Raises UnsupportedError if the environment variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise UnsupportedError(f"{SWITCH} is {value!r}; set it to 0 (off) or 1 (on, the default)")
    sites = spec.sites
    some = spec.activations.bits < 16 or any((sites.qkv, sites.gate_up, sites.down))
    return value == "1" and backend == "triton" and some and _compat.compiles_graphs()


def install() -> None:
    """Add the pass to the run that is being built. Idempotent."""
    here = Path(__file__)
    # Graphs in the compile cache hold programs: who reads those counts too.
    files = here, here.with_name("chaining.py"), here.with_name("kernels") / "chain.py"
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    _compat.add_graph_pass(_run, f"flatquant-{source}")
    _compat.watch_pieces(_tally.piece)


def fuse(graph: fx.Graph) -> Fused:
    """Fuse what can be fused in a functional graph of ATen operators, in place."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    norms = activations = alone = 0
    for node in list(graph.nodes):
        if _name(node) not in _FUSED or node.kwargs:
            continue
        if _fuse_norm(graph, node, order):
            norms += 1
        elif _fuse_silu_mul(graph, node):
            activations += 1
        else:
            alone += 1
    if norms or activations:
        graph.eliminate_dead_code()
    return Fused(norms, activations, alone)


def _fuse_norm(graph: fx.Graph, transform: Any, order: dict[fx.Node, int]) -> bool:
    """Fuse ``transform`` with the norm that makes its input, if that is all the norm's output is for."""
    fused, _ = _FUSED[_name(transform)]
    x, *rest = transform.args
    tensors = [argument for argument in rest if isinstance(argument, fx.Node)]
    source = _only_for(x, transform)
    norm: Any = source
    if source is not None and source.target is operator.getitem and source.args[1] == 0:
        norm = source.args[0]
    arguments = _norm_arguments(norm)
    if (
        source is None
        or norm is None
        or arguments is None
        or (norm is not source) != (arguments[1] is not None)
    ):
        return False
    normed, residual, weight, _ = arguments
    others = [] if norm is source else [user for user in norm.users if user is not source]
    if any(user.target is not operator.getitem or user.args[1] != 1 for user in others):
        return False
    one_block = all(_value(tensor).shape[0] == 1 for tensor in tensors)
    same_type = _value(normed).dtype == _value(weight).dtype == _value(source).dtype
    flat = _value(normed).dim() == 2 and (
        residual is None or _value(residual).dtype == _value(normed).dtype
    )
    # The kernel that quantizes leaves 1/rms out until the end, and fp16 does not reach that far.
    in_range = fused is not _OPS.rmsnorm_kron_quant.default or _value(normed).dtype != torch.float16
    # The new node takes the norm's place, so that whoever wants the residual comes after it.
    ready = all(order.get(tensor, len(order)) < order[norm] for tensor in tensors)
    if not (one_block and same_type and flat and in_range and ready):
        return False
    value = _value(transform)
    results = value if isinstance(value, tuple) else (value,)
    total = _value(normed).new_empty(0) if residual is None else norm.meta["val"][1]
    with graph.inserting_before(norm):
        new = graph.call_function(fused, (*arguments, *rest))
        new.meta["val"] = (*results, total)
        parts = [_part(graph, new, index) for index in range(len(results) + (residual is not None))]
    if results is not value:
        transform.replace_all_uses_with(parts[0])
    for user in list(transform.users):
        user.replace_all_uses_with(parts[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(transform)
    for user in others:
        user.replace_all_uses_with(parts[-1])
    return True


def _norm_arguments(norm: Any) -> tuple[Any, Any, Any, float] | None:
    """(x, residual or None, weight, eps) of one of vLLM's whole, weighted norms; None for any other node."""
    name = _name(norm)
    if name == "vllm_ir::rms_norm":
        x, residual, rest = norm.args[0], None, norm.args[1:]
    elif name == "vllm_ir::fused_add_rms_norm":
        x, residual, rest = norm.args[0], norm.args[1], norm.args[2:]
    else:
        return None
    weight, eps, *variance_size = rest
    if norm.kwargs or variance_size not in ([], [None]) or not isinstance(weight, fx.Node):
        return None
    return x, residual, weight, eps


def _fuse_silu_mul(graph: fx.Graph, transform: Any) -> bool:
    """Fuse ``transform`` with the ``silu(gate) * up`` that makes its input, if that is all it is for."""
    _, fused = _FUSED[_name(transform)]
    x, *rest = transform.args
    product = _only_for(x, transform)
    gate_up = None if product is None else _gate_up(product)
    if gate_up is None:
        return False
    with graph.inserting_before(transform):
        new = graph.call_function(fused, (gate_up, *rest))
        new.meta["val"] = transform.meta["val"]
    transform.replace_all_uses_with(new)
    graph.erase_node(transform)
    return True


def _gate_up(product: fx.Node) -> fx.Node | None:
    """The packed [T, 2K] whose halves ``product`` is ``silu(first) * second`` of."""
    if _name(product) != "aten::mul.Tensor":
        return None
    dtype = _value(product).dtype
    for silu, up in (product.args, product.args[::-1]):
        gate = _silu_input(silu, dtype)
        packed = None if gate is None else _half(gate, 0)
        if packed is not None and packed is _half(up, 1) and _value(packed).dtype == dtype:
            return packed
    return None


def _silu_input(node: Any, dtype: torch.dtype) -> Any:
    """``x`` where ``node`` is ``silu(x)`` as the compiler writes it, in float32 or not; else None."""
    node = _uncast(node, dtype)
    if _name(node) == "aten::silu":
        return node.args[0]
    wide: Any = None
    if _name(node) == "aten::div.Tensor":  # x / (1 + exp(-x))
        wide, below = node.args
        exp: Any = below.args[0] if _name(below) == "aten::add.Tensor" and below.args[1:] == (1,) else 0
        neg: Any = exp.args[0] if _name(exp) == "aten::exp" else 0
        if _name(neg) != "aten::neg" or neg.args[0] is not wide:
            return None
    elif _name(node) == "aten::mul.Tensor":  # x * sigmoid(x)
        for wide, sigmoid in (node.args, node.args[::-1]):
            if _name(sigmoid) == "aten::sigmoid" and sigmoid.args[0] is wide:
                break
        else:
            return None
    return None if wide is None else _uncast(wide, dtype)


def _half(node: Any, which: int) -> fx.Node | None:
    """The matrix of which ``node`` is the first (0) or second (1) half of the columns."""
    if _name(node) != "aten::slice.Tensor" or _value(node.args[0]).dim() != 2:
        return None
    given: list[Any] = list(node.args)
    packed, dim, start, end, step = given + [0, 0, _FROM_END, 1][len(given) - 1 :]
    width = _value(packed).shape[1]
    stop = width if not isinstance(end, int) or end >= width else end
    wanted = (0, width // 2) if which == 0 else (width // 2, width)
    return packed if dim in (1, -1) and step == 1 and (start or 0, stop) == wanted else None


def _uncast(node: Any, dtype: torch.dtype) -> Any:
    """``node`` without casts between ``dtype`` and float32, which the fused kernel makes as well."""
    while _name(node) == "prims::convert_element_type" and node.args[1] in (dtype, torch.float32):
        node = node.args[0]
    return node


def _only_for(node: Any, user: Any) -> fx.Node | None:
    """What makes ``node``, behind views that change nothing, if nobody but ``user`` reads it."""
    while isinstance(node, fx.Node) and list(node.users) == [user]:
        if _name(node) not in _VIEWS or _value(node).shape != _value(node.args[0]).shape:
            return node
        node, user = node.args[0], node
    return None


def _part(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    part = graph.call_function(operator.getitem, (node, index))
    part.meta["val"] = node.meta["val"][index]
    return part


def _name(node: Any) -> str:
    """The operator that ``node`` calls, as ``namespace::name.overload``; empty for anything else."""
    target = node.target if isinstance(node, fx.Node) else None
    return target.name() if isinstance(target, torch._ops.OpOverload) else ""


def _value(node: Any) -> Any:
    return node.meta["val"]


@dataclass(frozen=True)
class WarmUp:
    """Runs the fused kernels of one layer: at load, for none may compile while a CUDA graph is captured.

    site: the layer's, which tells what comes before it. bits: of activations. tokens: the most in a batch.
    """

    site: str
    bits: int
    dtype: torch.dtype
    tokens: int

    def run(self, layer: Any) -> None:
        """Run the fused kernels once for every token count that has a variant, with ``layer``'s factors."""
        factors = layer.transform_left, layer.transform_right
        clip = layer.transform_clip
        quantizes = self.bits < 16
        if self.site == "o" or (quantizes and self.site != "down" and self.dtype == torch.float16):
            return  # nothing is fused with these
        rest = (*factors, clip, self.bits) if quantizes else factors
        norm, silu_mul = (
            (rmsnorm_kron_quant, silu_mul_kron_quant) if quantizes else (rmsnorm_kron, silu_mul_kron)
        )
        width = layer.input_size_per_partition
        device = next(tensor.device for tensor in (*factors, clip) if tensor is not None)
        for count in warmup_tokens(self.tokens):
            if self.site == "down":
                x = torch.zeros(count, 2 * width, dtype=self.dtype, device=device)
                silu_mul(x, *rest)
                continue
            x = torch.zeros(count, width, dtype=self.dtype, device=device)
            # The model's first norm has no residual.
            for residual in (None, x) if self.site == "qkv" else (x,):
                norm(x, residual, x[0], 1e-6, *rest)


class _Tally:
    """Adds up what the pass did in the pieces of a model, to say it once.

    vLLM compiles a graph piece by piece, once for each range of token counts, and takes a piece that it
    has compiled already from memory or disk: then the pass does not run.
    """

    def __init__(self) -> None:
        self._fresh: Fused | None = None  # since the last piece
        self._pieces: dict[str, list[tuple[Any, Fused | None]]] = {}  # of each range: artifact, result

    def add(self, fused: Fused) -> None:
        self._fresh = fused if self._fresh is None else self._fresh + fused

    def piece(self, tokens: str, artifact: Any, first: bool, last: bool) -> None:
        """``artifact``: what vLLM has compiled, or taken from where it was, for ``tokens``."""
        if first:
            self._pieces[tokens] = []
        pieces = self._pieces.setdefault(tokens, [])
        known = next((fused for other, fused in pieces if other is artifact), None)
        pieces.append((artifact, known if self._fresh is None else self._fresh))
        self._fresh = None
        if last:
            results = [fused for _, fused in self._pieces.pop(tokens)]
            total = sum((fused for fused in results if fused is not None), Fused())
            if total:
                note = "" if None not in results else " (without the graphs from the compile cache)"
                _compat.logger.info("FlatQuant fusion, %s tokens: %s%s", tokens, total, note)
            elif None in results:
                _compat.logger.info("FlatQuant fusion, %s tokens: as in the compile cache", tokens)


_tally = _Tally()


def _run(graph: fx.Graph) -> None:
    _tally.add(fuse(graph))
    chain_operators(graph)
