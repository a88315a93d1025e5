"""Fake quantization's kernels on a GPU: the reference's numbers at real sizes, the same each time and in a CUDA graph."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent.parent / "interpret"))
from test_fake_quantize import check, inputs

from vllm_flatquant.calibration.straight_through import fake_quantize
from vllm_flatquant.kernels import fake_quantize as kernel

DEVICE = torch.device("cuda")
SHAPES = [
    (8192, 1, 4096),
    (8192, 1, 384),
    (2048, 1, 14336),
    (2048, 4, 3584),
    (300, 1, 28672),
    (28672, 1, 4096),
    (4096, 112, 128),
]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """What the kernels do not take fails; memory starts as NaN."""
    for name in ("fake_quantize_ref", "fake_quantize_backward_ref"):
        monkeypatch.setattr(kernel, name, None)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("learned", [True, False], ids=["clip", "number"])
def test_is_the_reference(shape: tuple[int, int, int], learned: bool) -> None:
    """Rows at both ends against the reference; each row gives alone what it gives among all; twice is the same."""
    z, grad = inputs(*shape, device="cuda")
    clip = torch.rand(shape[1], device=DEVICE) * 0.5 + 0.5 if learned else 0.9
    for bits in (4, 8):
        out = kernel.fake_quantize(z, bits, clip)
        dz, dclip = kernel.fake_quantize_backward(grad, z, bits, clip)
        for part in (slice(0, 60), slice(-60, None)):
            check(z[part], grad[part], bits, clip)
            assert torch.equal(out[part], kernel.fake_quantize(z[part], bits, clip))
            assert torch.equal(
                dz[part], kernel.fake_quantize_backward(grad[part], z[part], bits, clip)[0]
            )
        assert out.isfinite().all() and dz.isfinite().all()
        again, dclip_again = kernel.fake_quantize_backward(grad, z, bits, clip)
        assert torch.equal(dz, again)
        if learned:
            halves = [kernel.fake_quantize_backward(grad[i::2], z[i::2], bits, clip)[1] for i in (0, 1)]
            size = (grad.abs().sum(dim=-1) * z.abs().amax(dim=-1)).sum(dim=0)
            assert torch.equal(dclip, dclip_again)
            assert ((halves[0] + halves[1] - dclip).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_reaches_loss_and_gradients(value: float) -> None:
    z, _ = inputs(300, 2, 4096, device="cuda")
    z[100, 1, 77] = value
    clip = torch.tensor([0.7, 0.9], device=DEVICE, requires_grad=True)
    z.requires_grad_()
    out = fake_quantize(z, 4, clip)
    out.square().mean().backward()
    bad = ~out.isfinite().all(dim=-1)
    assert bad.sum() == 1 and bad[100, 1]
    assert clip.grad[0].isfinite() and not clip.grad[1].isfinite()
    assert torch.equal(~z.grad.isfinite().all(dim=-1), bad)


def test_captured_in_a_graph() -> None:
    """Forward and backward through autograd, replayed on other numbers."""
    z, grad = inputs(512, 2, 1024, device="cuda")
    z.requires_grad_()
    clip = torch.tensor([0.7, 0.9], device=DEVICE, requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        out = fake_quantize(z, 4, clip)
        return (out.detach(), *torch.autograd.grad(out, (z, clip), grad))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    for _ in range(2):
        with torch.no_grad():
            z.normal_()
            grad.normal_()
            clip.uniform_(0.5, 1)
        graph.replay()
        for mine, expected in zip(found, step(), strict=True):
            assert torch.equal(mine, expected)


def test_more_elements_than_32_bits_count() -> None:
    rows = 2**31 // 4096 + 8
    room = torch.cuda.get_device_properties(DEVICE).total_memory
    if 20e9 > room * torch.cuda.get_per_process_memory_fraction():
        pytest.skip("needs 20 GB for this process")
    torch.use_deterministic_algorithms(False)  # filling takes longer than the rest
    z = torch.zeros(rows, 4096, device=DEVICE)
    z[-16:] = torch.randn(16, 4096, device=DEVICE)
    for whole, alone in [
        (lambda: kernel.fake_quantize(z, 4), kernel.fake_quantize(z[-16:], 4)),
        (
            lambda: kernel.fake_quantize_backward(z, z, 4, 1.0)[0],
            kernel.fake_quantize_backward(z[-16:], z[-16:], 4, 1.0)[0],
        ),
    ]:
        assert torch.equal(whole()[-16:], alone)
