"""Fake quantization's kernels under Triton's interpreter (see test_kernels.py)."""

import pytest
import torch

pytest.importorskip("triton")
from vllm_flatquant.kernels import fake_quantize as module
from vllm_flatquant.kernels.jit import INTERPRET

pytestmark = pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)
SUMMED = 3e-7
"""Of the sum of |gradient|, what ``part`` may differ by: its terms are up to 2.5 times that (2 bits) before they cancel,
each product may be rounded or not (6e-8), and the sum is in another order. All else is bit for bit the same."""


@pytest.fixture
def by_kernel(monkeypatch):
    """What the kernels do not take fails."""
    for name in ("fake_quantize_ref", "fake_quantize_backward_ref"):
        monkeypatch.setattr(module, name, None)


REF, BACKWARD_REF = module.fake_quantize_ref, module.fake_quantize_backward_ref


def inputs(tokens: int, shards: int, k: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, one zero, one with ties for the largest, one with an outlier, one half way between codes; gradients."""
    z, grad = torch.randn(2, tokens, shards, k, device=device)
    z[0] = 0
    z[1, :, : (k + 1) // 2] = 3.0
    z[1, :, : k // 2 : 2] = -3.0
    z[2, -1, k // 3] = 1000.0
    z[3] = torch.randint(-20, 21, (shards, k), device=device) / 2
    z[3, :, 0] = 10.0
    return z, grad


def check(z: torch.Tensor, grad: torch.Tensor, bits: int, clip: torch.Tensor | float) -> None:
    """Forward bit for bit, -0 too; gradients but for the order of a sum. The reference runs on the CPU: PyTorch on a GPU
    divides by a number as it multiplies by its inverse, which can be another scale in the last place."""
    out = module.fake_quantize(z, bits, clip).cpu()
    dz, dclip = (x if x is None else x.cpu() for x in module.fake_quantize_backward(grad, z, bits, clip))
    z, grad, clip = z.cpu(), grad.cpu(), clip.cpu() if isinstance(clip, torch.Tensor) else clip
    want, (want_dz, want_dclip) = REF(z, bits, clip), BACKWARD_REF(grad, z, bits, clip)
    assert torch.equal(out.view(torch.int32), want.view(torch.int32))
    size = z.abs()
    top = size == size.amax(dim=-1, keepdim=True)
    assert torch.equal(dz[~top], want_dz[~top])
    sizes = grad.abs().sum(dim=-1)
    assert ((dz - want_dz).abs() <= SUMMED * sizes.unsqueeze(-1)).all()
    assert (dclip is None) == (want_dclip is None)
    if dclip is not None:
        assert dclip.shape == want_dclip.shape
        terms = (sizes * size.amax(dim=-1)).sum_to_size(dclip.shape)
        assert ((dclip - want_dclip).abs() <= SUMMED * terms).all()


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 3, 128, 384, 1000, 1024, 4096])
def test_is_the_reference(by_kernel: None, k: int, shards: int) -> None:
    torch.manual_seed(k + shards)
    z, grad = inputs(5, shards, k)
    for bits in (2, 4, 8):
        for clip in (1.0, 0.8, torch.tensor([0.7]), torch.rand(shards) * 0.5 + 0.5):
            check(z, grad, bits, clip)


def test_every_tie_rounds_to_even(by_kernel: None) -> None:
    """Scale 1/2 and halves of it, beyond both ends of the codes."""
    z = torch.arange(-64, 65).repeat(2, 1) / 8 * 0.5
    clip = torch.tensor(3.5 / 4.0)
    assert torch.equal(module.scale_ref(z, 4, clip), torch.full((2,), 0.5))
    check(z, torch.randn_like(z), 4, clip)
    assert module.fake_quantize(z, 4, clip).unique().numel() == 16


def test_neither_inputs_apart_nor_few_rows_matter(by_kernel: None) -> None:
    z, grad = torch.randn(384, 7).T, torch.randn(7, 1).expand(7, 384)
    check(z, grad, 4, 0.9)
    check(z[0], grad[0], 4, 0.9)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["z", "grad"])
def test_what_is_not_finite_stays_so(by_kernel: None, value: float, where: str) -> None:
    """A bad row is as bad as the reference's, element by element, and reaches no other row."""
    z, grad = inputs(5, 2, 40)
    {"z": z, "grad": grad}[where][4, 0, 7] = value
    clip = torch.tensor([0.7, 0.9])
    out, (dz, dclip) = (
        module.fake_quantize(z, 4, clip),
        module.fake_quantize_backward(grad, z, 4, clip),
    )
    want, (want_dz, want_dclip) = REF(z, 4, clip), BACKWARD_REF(grad, z, 4, clip)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(dz.isnan(), want_dz.isnan())
    assert torch.equal(out.nan_to_num(), want.nan_to_num())
    torch.testing.assert_close(dz, want_dz, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert not dclip[0].isfinite() and not want_dclip[0].isfinite() and dclip[1].isfinite()
    assert out[4, 0].isfinite().all() == (where == "grad")


def test_what_the_kernels_leave_to_the_reference() -> None:
    z = torch.randn(3, 2, 8)
    assert module._takes(z, 1.0) and module._takes(z, torch.ones(2)) and module._takes(z, torch.ones(()))
    for other, clip in [
        (z.double(), 1.0),
        (z[:0], 1.0),
        (torch.zeros(1, module.LONGEST + 1), 1.0),
        (z, torch.ones(3, 1)),
        (z, torch.ones(2).double()),
    ]:
        assert not module._takes(other, clip)
        assert torch.equal(module.fake_quantize(other, 4, clip), REF(other, 4, clip))
