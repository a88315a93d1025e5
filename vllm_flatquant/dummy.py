"""Values for ``--load-format dummy``: random codes, well-conditioned transforms.

vLLM fills floats with values around zero and leaves integers as they were in memory. Transforms would be
near singular, clips and scales negative, and codes perhaps all zero, which a GPU multiplies faster.
"""

from functools import cache

import torch
from torch import Tensor, nn

_SCALE = 1e-3 / 8
"""Of weights about as large as those that vLLM gives to an unquantized model."""


def fill_dummy(layer: nn.Module) -> None:
    """Overwrite the FlatQuant parameters that ``layer`` itself has, in the checkpoint's layout, in place.

    Transforms become orthogonal matrices of bf16 values, each its own inverse transpose up to rounding.
    """
    parameters = dict(layer.named_parameters(recurse=False))
    for name, value in parameters.items():
        tensor = value.data
        if name == "weight_packed":
            tensor.view(torch.uint8).random_(0, 256)
        elif name == "weight_scale":
            tensor.fill_(_SCALE)
        elif name.endswith("_clip"):
            tensor.fill_(1)
        elif name.startswith(("transform_", "k_transform_")):
            tensor.copy_(_orthogonal(tensor.shape[-1]))
    if "k_transform_inverse_t" in parameters:
        parameters["k_transform_inverse_t"].data.copy_(parameters["k_transform_matrix"].data)


@cache
def _orthogonal(size: int) -> Tensor:
    """A random orthogonal matrix [size, size] of bf16 values; on the CPU, which needs no solver's workspace.

    One of each size for all layers: threads that wait for each other on a busy machine make 0.1 s of each.
    """
    matrix = torch.empty(size, size, dtype=torch.float32, device="cpu")
    return nn.init.orthogonal_(matrix).bfloat16()
