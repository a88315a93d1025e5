"""The head's kernel under Triton's interpreter (see test_kernels.py)."""

import pytest
import torch

pytest.importorskip("triton")
from vllm_flatquant.kernels.jit import INTERPRET
from vllm_flatquant.kernels.w8_linear import MOST_TOKENS, w8_linear_ref, w8_linear_triton

pytestmark = pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "t,n,k",
    [(0, 40, 128), (1, 130, 96), (5, 64, 300), (33, 200, 128), (100, 130, 96), (MOST_TOKENS, 129, 64)],
)
def test_w8_linear(t: int, n: int, k: int, bias: bool) -> None:
    torch.manual_seed(t)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, x = torch.rand(n, 1) + 0.1, torch.randn(t, 2 * k)[:, :k]  # rows apart
    b = torch.randn(n) if bias else None
    torch.testing.assert_close(
        w8_linear_triton(x, codes, scale, b), w8_linear_ref(x, codes, scale, b), rtol=1e-5, atol=1e-3
    )


def test_many_tokens_go_through_slices() -> None:
    codes = torch.randint(-128, 128, (70, 32), dtype=torch.int8)
    scale, x = torch.rand(70, 1), torch.randn(MOST_TOKENS + 1, 32)
    torch.testing.assert_close(
        w8_linear_triton(x, codes, scale, None), w8_linear_ref(x, codes, scale), rtol=1e-5, atol=1e-3
    )
