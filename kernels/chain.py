"""Several operators in one call, so that the host pays once for what a compiled graph runs one after the other.

A program is a JSON string ``{"inputs": [...], "steps": [[operator, arguments], ...], "results": [value, ...]}``.
inputs: ``[dtype, shape, stride]`` of each, shape and stride null if they can change between calls. An argument is a
number or null as it is, ``["dtype", name]``, or a value: ``["in", i]``, the i-th input, or ``["out", step, index]``,
what an earlier step returned (index null where the operator returns one tensor).

On CUDA the first call for a number of tokens runs the operators and records which kernels they started. Later calls
start the same kernels with other pointers: no dispatcher, no checks, one allocation for all that lies in between. Beyond
256 tokens a recording serves every number with the same ``jit.room``: a server meets few numbers twice.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import kron_quant, rmsnorm_kron_quant, silu_mul_kron_quant, w4_gemm  # noqa: F401 (their operators)
from .jit import EXACT, OPERATORS, recording, register, room
from .replay import Recorder, Replay, apart

_KEPT = 256
"""Recordings of a program that are kept: numbers of tokens, or rooms, that come again."""
_UNKNOWN: Any = object()


class Program:
    """A parsed program and its recordings."""

    def __init__(self, text: str) -> None:
        parsed = json.loads(text)
        self.inputs: list[Any] = parsed["inputs"]
        self.changing = [i for i, (_, shape, _) in enumerate(self.inputs) if shape is None]
        self.steps: list[tuple[str, list[Any]]] = [(name, args) for name, args in parsed["steps"]]
        self.results: list[Any] = parsed["results"]
        self.recordings: dict[Any, Replay | None] = {}
        self.exact = False  # a recording was met that is right for one number of tokens only

    def interpret(self, kind: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call the operators' own functions: "cuda", "cpu" or "fake"."""
        values: list[Any] = []

        def value(given: Any) -> Any:
            if not isinstance(given, list):
                return given
            if given[0] == "in":
                return inputs[given[1]]
            if given[0] == "dtype":
                return getattr(torch, given[1])
            found = values[given[1]]
            return found if given[2] is None else found[given[2]]

        for name, arguments in self.steps:
            values.append(OPERATORS[name][kind](*map(value, arguments)))
        return [value(result) for result in self.results]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """On CUDA: replay what was recorded for inputs like these, else interpret and record."""
        pointers = [x.data_ptr() for x in inputs]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        tokens, key = self._key(inputs)
        replay = self.recordings.get(key, _UNKNOWN)
        if bits % 16 == 0 and replay is not _UNKNOWN:
            return self.interpret("cuda", inputs) if replay is None else replay.run(pointers, tokens)
        self._check(inputs)
        if bits % 16 or not apart(inputs):
            return self.interpret("cuda", inputs)
        recorder = Recorder(inputs, self.changing, tokens)
        with recording(recorder):
            results = self.interpret("cuda", inputs)
        made = recorder.finish(results)
        if made is not None and tokens > EXACT and not recorder.serves_room(results):
            self.exact = True  # those made before still are what they were
            _, key = self._key(inputs)
        if len(self.recordings) >= _KEPT:
            self.recordings.pop(next(iter(self.recordings)))
        self.recordings[key] = made
        return results

    def _key(self, inputs: Sequence[Tensor]) -> tuple[int, Any]:
        """The number of tokens (0 where inputs that change have different numbers of rows), and what a recording is for."""
        some = [inputs[i] for i in self.changing]
        tokens = some[0].shape[0] if some else 0
        for x in some:
            if x.shape[0] != tokens:
                return 0, (inputs[0].device, *[(x.shape, x.stride()) for x in some])
        like = [(x.shape[1:], x.stride()) for x in some]
        return tokens, (inputs[0].device, tokens if self.exact else room(tokens), *like)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """ValueError if inputs are not what the program was made for: a recording would not fit them."""
        for number, (x, (dtype, shape, stride)) in enumerate(zip(inputs, self.inputs, strict=True)):
            expected = dtype, shape or list(x.shape), stride or list(x.stride())
            # No step is ever taken along a dimension of size 1, and PyTorch gives it any stride.
            strides = zip(x.shape, x.stride(), expected[2], strict=False)
            same = (str(x.dtype), list(x.shape)) == (f"torch.{dtype}", expected[1])
            if not same or any(n != 1 and a != b for n, a, b in strides):
                raise ValueError(
                    f"flatquant: input {number} of a chain is {x.dtype} {tuple(x.shape)}, made for {expected}"
                )


@cache
def _program(text: str) -> Program:
    return Program(text)


def _chain_cuda(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    return _program(program).run(inputs)


def _chain_cpu(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    return _program(program).interpret("cpu", inputs)


def _chain_fake(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    return _program(program).interpret("fake", inputs)


register("chain", _chain_cuda, _chain_cpu, _chain_fake)


def chain(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    """Run a program of this package's operators on ``inputs``. Numbers are those of the operators, bit for bit,
    and so are errors."""
    result: list[Tensor] = torch.ops.flatquant.chain(inputs, program)
    return result
