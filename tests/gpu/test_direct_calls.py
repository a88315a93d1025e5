"""The operators as direct users call them, not as vLLM does: on another GPU than the current one, on parts of other
memory."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from vllm_flatquant.kernels.kron_quant import kron_quant
from vllm_flatquant.kernels.pack import pack_device
from vllm_flatquant.kernels.w4_gemm import w4_gemm


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    """Refused, be the variant compiled or not; computed where the caller says which GPU it is."""
    x = torch.randn(5, 4096, device="cuda:1").bfloat16()
    clip = torch.ones(1, device="cuda:1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"on cuda:1, the current device is cuda:0"):
            kron_quant(x, None, None, clip, 8)
        expected = kron_quant(x.to("cuda:0"), None, None, clip.to("cuda:0"), 8)
    with torch.cuda.device(1):
        found = kron_quant(x, None, None, clip, 8)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 14336), (264, 384)])
@pytest.mark.parametrize("shift", [1, 4, 8])
def test_w4_gemm_of_memory_that_starts_anywhere(n: int, k: int, shift: int) -> None:
    """Codes and weights that do not start at a multiple of 16 bytes give what they give where they do."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        memory = x.new_empty(x.numel() + shift)[shift:].view(x.shape)
        assert memory.data_ptr() % 16
        return memory.copy_(x)

    weight = pack_device(torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda"))
    weight_scale = torch.rand(n, 1, device="cuda") + 0.1
    for t in (1, 16, 64, 300, 2048):
        codes = torch.randint(-8, 8, (t, k), dtype=torch.int8, device="cuda")
        scale = torch.rand(t, 1, device="cuda") + 0.1
        expected = w4_gemm(codes, scale, weight, weight_scale, None, torch.bfloat16)
        for x, w in ((moved(codes), weight), (codes, moved(weight)), (moved(codes), moved(weight))):
            assert torch.equal(w4_gemm(x, scale, w, weight_scale, None, torch.bfloat16), expected)
