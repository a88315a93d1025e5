"""Kernels that work on addresses, as compiled ones do, for tests of what records and replays them."""

import ctypes
import json
from types import SimpleNamespace

import numpy as np
import torch

from vllm_flatquant.kernels import chain, jit


def floats(address, count):
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


class Compiled:
    """A compiled kernel: ``out = a + factor * b`` on so many rows of ``columns``."""

    def __init__(self, columns=1):
        self.columns = columns

    def __getitem__(self, grid):
        def run(*args, stream=None):
            out, a, b, rows, factor = args
            assert stream == 7 or isinstance(out, torch.Tensor)
            bases = [getattr(x, "base", x) for x in (out, a, b)]
            at = [x.data_ptr() if hasattr(x, "data_ptr") else x for x in bases]
            count = rows * self.columns
            floats(at[0], count)[:] = floats(at[1], count) + factor * floats(at[2], count)

        return run


class Kernel:
    """One that compiles when it is started. rows: what it calls their number."""

    def __init__(self, rows, columns=1):
        self.arg_names, self.columns = ("out", "a", "b", rows, "FACTOR"), columns

    def __getitem__(self, grid):
        def start(*args, FACTOR):
            compiled = Compiled(self.columns)
            compiled[grid](*args, FACTOR)
            return compiled

        return start


def pretend_device(monkeypatch, **operators):
    """Have ``jit.launch`` start such kernels without a card, and chains know these operators."""
    monkeypatch.setattr(jit, "INTERPRET", False)
    monkeypatch.setattr(jit, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    for name, function in operators.items():
        monkeypatch.setitem(jit.OPERATORS, name, {"cuda": function})


def program(*steps, results, count=2):
    """A chain's program on float32 inputs of any shape."""
    like = {"inputs": [["float32", None, None]] * count, "steps": list(steps), "results": results}
    return chain.Program(json.dumps(like))
