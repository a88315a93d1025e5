"""kernels/jit.py: launch() asks Triton for a variant once, and again for whatever would be another variant."""

from types import SimpleNamespace

import pytest
import torch

from vllm_flatquant.kernels import jit


class Kernel:
    """Stands in for a compiled-on-demand kernel; remembers how it was started."""

    arg_names = ("x", "n", "BLOCK", "FLAG")

    def __init__(self):
        self.asked, self.started = [], []

    def __getitem__(self, grid):
        def start(*args, **meta):
            self.asked.append((grid, args, meta))
            return {(*grid, 1, 1): lambda *again: self.started.append(again)}

        return start


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(jit, "INTERPRET", False)
    monkeypatch.setattr(jit, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def test_a_known_variant_is_started_directly(kernel):
    x, y = torch.zeros(64), torch.ones(64)
    jit.launch(kernel, (3,), x, 48, BLOCK=16, num_warps=4, FLAG=True)
    jit.launch(kernel, (3,), y, 32, BLOCK=16, num_warps=4, FLAG=True)
    assert len(kernel.asked) == 1
    assert [args[0] is y and args[1:] for args in kernel.started] == [(32, 16, True)]


@pytest.mark.parametrize(
    "x, n, block, flag",
    [
        (torch.zeros(64, dtype=torch.int8), 48, 16, True),
        (torch.zeros(65)[1:], 48, 16, True),  # not aligned
        (torch.zeros(64), 47, 16, True),
        (torch.zeros(64), 1, 16, True),
        (torch.zeros(64), 2**32, 16, True),
        (torch.zeros(64), 48, 32, True),
        (torch.zeros(64), 48, 16, False),
    ],
)
def test_another_variant_is_asked_for(kernel, x, n, block, flag):
    jit.launch(kernel, (3,), torch.zeros(64), 48, BLOCK=16, FLAG=True)
    jit.launch(kernel, (3,), x, n, BLOCK=block, FLAG=flag)
    assert len(kernel.asked) == 2 and not kernel.started


def test_another_kernel_or_device_is_asked_for(kernel, monkeypatch):
    other = Kernel()
    for which in (kernel, other):
        jit.launch(which, (3,), torch.zeros(64), 48, BLOCK=16, FLAG=True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    jit.launch(kernel, (3,), torch.zeros(64), 48, BLOCK=16, FLAG=True)
    assert (len(kernel.asked), len(other.asked)) == (2, 1)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(base=x)])
def test_tensors_of_another_gpu_are_refused_known_variant_or_not(kernel, monkeypatch, wrap):
    """A tensor, and a descriptor of one."""
    monkeypatch.setattr(jit, "_specialization", lambda argument: type(argument))
    for device in (-1, 0):  # -1: the CPU, which is for Triton to judge
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _, device=device: device)
        jit.launch(kernel, (3,), wrap(torch.zeros(64)), 48, BLOCK=16, FLAG=True)
    assert (len(kernel.asked), len(kernel.started)) == (1, 1)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    for block in (16, 32):
        with pytest.raises(RuntimeError, match=r"on cuda:1, the current.* cuda:0; .*device\(1\)"):
            jit.launch(kernel, (3,), wrap(torch.zeros(64)), 48, BLOCK=block, FLAG=True)
    assert (len(kernel.asked), len(kernel.started)) == (1, 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    jit.launch(kernel, (3,), wrap(torch.zeros(64)), 48, BLOCK=16, FLAG=True)
    assert len(kernel.asked) == 2


def test_without_gluon_it_is_said_once(caplog):
    jit.has_gluon.cache_clear()
    assert not jit.has_gluon("not_there") and not jit.has_gluon("not_there")
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        "flatquant: not_there needs another Triton"
    ]


def test_collecting_starts_nothing_and_names_each_variant_once(kernel):
    x = torch.zeros(64)
    jit.launch(kernel, (3,), x, 16, BLOCK=16, FLAG=True)
    assert len(kernel.asked) == jit.variants() == 1
    with jit.collecting(lambda kernel, args, meta: (args[1], meta["BLOCK"])) as found:
        for n in (16, 32, 1, 1):
            for block in (16, 32):
                jit.launch(kernel, (3,), x, n, BLOCK=block, FLAG=True)
    assert list(found.values()) == [(16, 32), (1, 16), (1, 32)]  # (16, 16) was compiled before
    assert len(kernel.asked) == 1
    jit.launch(kernel, (3,), x, 1, BLOCK=32, FLAG=True)
    assert len(kernel.asked) == jit.variants() == 2
