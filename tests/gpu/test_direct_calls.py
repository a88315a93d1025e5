"""The operators as direct users call them, not as vLLM does: on another GPU than the current one."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from vllm_flatquant.kernels.kron_quant import kron_quant


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
