"""Compiled graphs: operators of ours that follow each other become one call (``kernels/chain.py``).

A prefill runs without CUDA graphs, and on a fast GPU the host is what it waits for: eight operators a layer, each
through PyTorch's dispatcher and Triton's launcher, took longer than their kernels (docs/decisions.md).
"""

import json
import operator
from typing import Any

import torch
from torch import fx

from .kernels.chain import chain  # noqa: F401 (defines the op)

CHAINED = ("kron_quant", "rmsnorm_kron_quant", "silu_mul_kron_quant", "w4_gemm")
_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view")


def chain_operators(graph: fx.Graph) -> int:
    """Replace runs of operators with nothing of others' in between, in place; how many operators were replaced."""
    replaced = 0
    group: list[fx.Node] = []
    inside: dict[
        fx.Node, Any
    ] = {}  # nodes that the group's call will replace -> its value, as programs write it
    for node in list(graph.nodes):
        name = _operator(node)
        if name and not node.kwargs:
            inside[node] = ["out", len(group), None]
            group.append(node)
        elif _same_value(node) in inside:
            inside[node] = inside[node.args[0]]
        elif node.target is operator.getitem and node.args[0] in inside:
            inside[node] = [*inside[node.args[0]][:2], node.args[1]]
        elif _writes(node) or any(source in inside for source in node.all_input_nodes):
            replaced += _replace(graph, group, inside)
            group, inside = [], {}
    return replaced


def _replace(graph: fx.Graph, group: list[fx.Node], inside: dict[fx.Node, Any]) -> int:
    """Put one call in the place of a group; 0 if that would not save any."""
    if len(group) < 2:
        return 0
    inputs: list[fx.Node] = []

    def encoded(argument: Any) -> Any:
        if isinstance(argument, torch.dtype):
            return ["dtype", str(argument).removeprefix("torch.")]
        if not isinstance(argument, fx.Node):
            return argument
        if argument in inside:
            return inside[argument]
        if argument not in inputs:
            inputs.append(argument)
        return ["in", inputs.index(argument)]

    steps = [[_operator(node), [encoded(a) for a in node.args]] for node in group]
    wanted = [node for node in inside if any(user not in inside for user in node.users)]
    results: list[Any] = []
    for node in wanted:
        if inside[node] not in results:
            results.append(inside[node])
    if not inputs or not results:
        return 0
    program = {"inputs": [_like(node) for node in inputs], "steps": steps, "results": results}
    last = group[-1]
    with graph.inserting_after(last):
        call = graph.call_function(torch.ops.flatquant.chain.default, (inputs, json.dumps(program)))
    parts: list[fx.Node] = []
    for index, result in enumerate(results):
        with graph.inserting_after(parts[-1] if parts else call):
            part = graph.call_function(operator.getitem, (call, index))
        part.meta["val"] = next(node.meta["val"] for node in wanted if inside[node] == result)
        parts.append(part)
    call.meta["val"] = [part.meta["val"] for part in parts]
    for node in wanted:
        part = parts[results.index(inside[node])]
        node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
    for node in reversed(list(inside)):
        graph.erase_node(node)
    return len(group)


def _operator(node: fx.Node) -> str:
    """The name of one of ours that can be in a chain; else empty."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    space, _, name = node.target.name().partition("::")
    return name if space == "flatquant" and name in CHAINED else ""


def _writes(node: fx.Node) -> bool:
    """Whether ``node`` can change a tensor, now or when it becomes in-place again: a call must not move behind it."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _same_value(node: fx.Node) -> Any:
    """What ``node`` is a view of that changes nothing; else None."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.name() not in _VIEWS:
        return None
    source: Any = node.args[0]
    return source if node.meta["val"].shape == source.meta["val"].shape else None


def _like(node: fx.Node) -> list[Any]:
    """Type, shape and stride of an input; no shape and stride if they depend on the number of tokens."""
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    sizes = [*value.shape, *value.stride()]
    if not all(isinstance(size, int) for size in sizes):
        return [dtype, None, None]
    return [dtype, list(value.shape), list(value.stride())]
