"""Run by ``test_direct_calls.py`` where two GPUs are visible: tensors of another GPU than the current one."""

import re

import torch

from vllm_flatquant.kernels.kron_quant import kron_quant

x = torch.randn(5, 4096, device="cuda:1").bfloat16()
clip = torch.ones(1, device="cuda:1")
for variant in ("not compiled", "compiled"):
    try:
        kron_quant(x, None, None, clip, 8)
    except RuntimeError as error:
        assert re.search(r"on cuda:1, the current device is cuda:0", str(error)), error
    else:
        raise AssertionError(f"not refused, {variant}")
    expected = kron_quant(x.to("cuda:0"), None, None, clip.to("cuda:0"), 8)
with torch.cuda.device(1):
    found = kron_quant(x, None, None, clip, 8)
for a, b in zip(found, expected, strict=True):
    assert a.device == x.device and torch.equal(a.cpu(), b.cpu())
print("as expected")
