"""Values for ``--load-format dummy``: random codes, well-conditioned transforms.

vLLM fills floats with values around zero and leaves integers as they were in memory. Transforms would be
near singular, clips and scales negative, and codes perhaps all zero, which a GPU multiplies faster.
"""

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
            tensor.copy_(_orthogonal(tensor).bfloat16())
    if "k_transform_inverse_t" in parameters:
        parameters["k_transform_inverse_t"].data.copy_(parameters["k_transform_matrix"].data)


def _orthogonal(like: Tensor) -> Tensor:
    """Random orthogonal matrices [..., n, n] in float32; made on the CPU, which needs no solver's workspace."""
    matrices = torch.empty(like.shape, dtype=torch.float32, device="cpu").reshape(-1, *like.shape[-2:])
    for matrix in matrices:
        nn.init.orthogonal_(matrix)
    return matrices.reshape(like.shape)
