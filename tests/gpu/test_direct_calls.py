"""The operators as direct users call them, not as vLLM does: on another GPU than the current one, on parts of other
memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from vllm_flatquant.kernels.pack import pack_device
from vllm_flatquant.kernels.w4_gemm import w4_gemm

from .engines import ROOT, gpus


def test_tensors_on_another_gpu_than_the_current_one() -> None:
    """Refused, be the variant compiled or not; computed where the caller says which GPU it is."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **gpus(2), "PYTHONPATH": path}  # a test itself may see only one
    script = [sys.executable, str(Path(__file__).with_name("two_gpus.py"))]
    done = subprocess.run(
        script, check=False, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "as expected\n", done.stderr


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
