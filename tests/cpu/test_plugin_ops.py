"""The plugin's PyTorch operators obey what torch.library asks of an operator."""

import pytest
import torch

from vllm_flatquant import ops

LEFT, RIGHT = torch.randn(2, 4, 4), torch.randn(2, 6, 6)
CLIP = torch.ones(2)
WEIGHT = torch.randint(-8, 8, (10, 48), dtype=torch.int8)
X = torch.randn(5, 48)


@pytest.mark.parametrize(
    "op, arguments",
    [
        (ops.linear_torch, (X, LEFT, RIGHT, CLIP, 4, WEIGHT, torch.rand(10, 1), torch.randn(10))),
        (ops.linear_torch, (X.bfloat16(), None, None, CLIP, 8, WEIGHT, torch.rand(10, 1), None)),
        (ops.kron_torch, (X, LEFT, RIGHT)),
        (ops.kron_torch, (X, None, None)),
        (ops.kron_torch, (torch.randn(48, 5).T, LEFT, None)),
        (ops.head_transform, (X, torch.randn(12, 12), torch.ones(2), 4, 12)),
        (ops.head_transform, (torch.randn(5, 96)[:, 48:], None, torch.ones(1), 8, 12)),
        (ops.head_transform, (X, torch.randn(12, 12), None, 16, 12)),
    ],
)
def test_operators_pass_opcheck(op, arguments):
    result = torch.library.opcheck(op, arguments)
    assert set(result.values()) == {"SUCCESS"}
