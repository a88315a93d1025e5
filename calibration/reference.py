"""A checkpoint run in PyTorch on the `*_ref` functions: what serving is compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import shown
from ..kernels.kron import kron_ref
from ..kernels.kron_quant import kron_quant_ref
from ..kernels.pack import unpack_codes
from ..kernels.quantize import dequantize_weight_ref, fake_quant_kv_ref
from ..kernels.w4_gemm import w4_gemm_ref
from ..sites import SITE_NAMES
from ..spec import FlatQuantSpec, SpecError, parse_spec
from .architectures import Architecture, find_architecture
from .block import set_submodule
from .errors import UserError
from .head import PACKED, SCALE, ReferenceHead
from .source import (
    ModelSource,
    WeightFiles,
    check_weights,
    load_config,
    meta_model,
    read_config,
    resolve_folder,
)


class ReferenceSite(nn.Module):
    """A finished transform. ``forward(x)`` gives (codes int8 [T, K], scale float32 [T, S]), or
    (transformed x [T, K], None) where activations keep 16 bits. The last result is kept for the
    linears that share it. ``observe``, if set, receives the dequantized result [T, K] once per input.
    """

    left: Tensor | None
    right: Tensor | None
    clip: Tensor

    def __init__(self, left: Tensor | None, right: Tensor | None, clip: Tensor | None, bits: int):
        super().__init__()
        for name, value in (("left", left), ("right", right), ("clip", clip)):
            self.register_buffer(name, value)
        self.bits = bits
        self.observe: Callable[[Tensor], None] | None = None
        self._memo: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., K]."""
        if self._memo is None or self._memo[0] is not x:
            flat = x.reshape(-1, x.shape[-1])
            result: tuple[Tensor, Tensor | None]
            if self.bits == 16:
                result = kron_ref(flat, self.left, self.right), None
            else:
                result = kron_quant_ref(flat, self.left, self.right, self.clip, self.bits)
            if self.observe is not None:
                self.observe(dequantize_activation(*result))
            self._memo = x, result
        return self._memo[1]


def dequantize_activation(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Values [T, K] of codes [T, K] and scale [T, S]; codes themselves if scale is None."""
    if scale is None:
        return codes
    blocks = codes.unflatten(-1, (scale.shape[1], -1)).float()
    return (blocks * scale.unsqueeze(-1)).flatten(-2)


class ReferenceLinear(nn.Module):
    """A linear layer behind a ReferenceSite.

    Either codes int8 [N, K] with scale float32 [N, groups], or a plain ``weight`` [N, K] that has not
    been rounded yet (while GPTQ works its way through a block).
    """

    codes: Tensor
    scale: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        site: ReferenceSite,
        bias: Tensor | None,
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
    ):
        super().__init__()
        self.site = [site]
        for name, value in (("codes", codes), ("scale", scale), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        z, z_scale = self.site[0](x)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if self.weight is not None:
            out = F.linear(dequantize_activation(z, z_scale).to(x.dtype), self.weight.to(x.dtype), bias)
        elif z_scale is None:
            out = F.linear(z, dequantize_weight_ref(self.codes, self.scale).to(x.dtype), bias)
        else:
            out = w4_gemm_ref(z, z_scale, self.codes, self.scale, self.bias, x.dtype)
        return out.unflatten(0, x.shape[:-1])


class ReferenceKV(nn.Module):
    """P_h on q and k after RoPE and the fake-quantized KV cache. q [B, H, T, D], k and v [B, KV, T, D]."""

    k_transform_matrix: Tensor
    k_transform_inverse_t: Tensor
    k_transform_clip: Tensor
    v_transform_clip: Tensor

    def __init__(self, tensors: dict[str, Tensor], prefix: str, spec: FlatQuantSpec):
        super().__init__()
        self.spec = spec
        for name in (
            "k_transform.matrix",
            "k_transform.inverse_t",
            "k_transform.clip",
            "v_transform.clip",
        ):
            self.register_buffer(name.replace(".", "_"), tensors.get(f"{prefix}.{name}"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Transformed and fake-quantized q, k, v in their dtype."""
        kv = self.spec.kv
        if kv.k_bits < 16:
            q = (q.float() @ self.k_transform_inverse_t).to(q.dtype)
            k = (k.float() @ self.k_transform_matrix).to(k.dtype)
            k = fake_quant_kv_ref(k, kv.k_bits, self.k_transform_clip)
        if kv.v_bits < 16:
            v = fake_quant_kv_ref(v, kv.v_bits, self.v_transform_clip)
        return q, k, v


def install_block(
    layer: nn.Module,
    tensors: dict[str, Tensor],
    spec: FlatQuantSpec,
    arch: Architecture,
    weights: dict[str, Tensor] | None = None,
) -> dict[str, ReferenceSite]:
    """Replace a decoder layer's linears, norms and KV hook by the finished ones, in place.

    tensors: a block's checkpoint tensors by relative name. weights: linears that are not rounded yet
    [out, in]; for these ``weight_packed`` is not looked up. A linear that ``ignore`` names is left as it is,
    with its weight from ``tensors``. Returns the sites by name.
    """
    weights = weights or {}
    owner = {"qkv": arch.attention, "o": arch.attention, "gate_up": arch.mlp, "down": arch.mlp}
    sites, quantized = {}, []
    for group, name in zip(arch.groups, SITE_NAMES, strict=True):
        if f"{group[0]}.weight" in tensors:
            continue
        prefix = f"{owner[name]}.{name}_transform"
        left = tensors.get(f"{prefix}.head" if name == "o" else f"{prefix}.left")
        right = tensors.get(f"{prefix}.right")
        sites[name] = ReferenceSite(left, right, tensors.get(f"{prefix}.clip"), spec.activations.bits)
        for linear in group:
            bias = tensors.get(f"{linear}.bias")
            if linear in weights:
                new = ReferenceLinear(sites[name], bias, weight=weights[linear])
            else:
                codes = unpack_codes(tensors[f"{linear}.weight_packed"], spec.weights.bits)
                new = ReferenceLinear(sites[name], bias, codes, tensors[f"{linear}.weight_scale"])
            set_submodule(layer, linear, new)
            quantized.append(f"{linear}.")
    layer.flatquant_sites = nn.ModuleDict(sites)
    with torch.no_grad():
        for name, parameter in list(layer.named_parameters()):
            if name in tensors and not any(name.startswith(q) for q in quantized):
                module, _, attribute = name.rpartition(".")
                value = nn.Parameter(tensors[name].to(parameter.dtype), requires_grad=False)
                setattr(layer.get_submodule(module), attribute, value)
    attention: Any = layer.get_submodule(arch.attention)
    attention.flatquant_kv = ReferenceKV(tensors, arch.attention, spec)
    attention.flatquant_qkv = attention.flatquant_kv.forward
    return sites


def read_spec(path: Path) -> FlatQuantSpec | None:
    """The spec of a checkpoint folder, None for an unquantized model; UserError if it is not usable."""
    config = read_config(path).get("quantization_config")
    if config is None:
        return None
    if not isinstance(config, dict) or config.get("quant_method") != "flatquant":
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise UserError(
            f"{path} was quantized by another method ('{shown(method)}'); evaluate a flatquant checkpoint or an "
            "unquantized model"
        )
    try:
        return parse_spec(config)
    except SpecError as error:
        raise UserError(f"{path}/config.json: {error}") from None


def quantized_spec(path: Path) -> FlatQuantSpec:
    """The spec of a checkpoint folder; UserError also for an unquantized model."""
    spec = read_spec(path)
    if spec is None:
        raise UserError(f"{path} is not quantized; make a checkpoint with `flatquant quantize`")
    return spec


def load_reference(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A flatquant checkpoint, or an unquantized model, as a Transformers model for inference.

    dtype: of all mathematics outside the integer products. Raises UserError for a folder that is
    damaged, incomplete or not ours.
    """
    path = resolve_folder(model)
    spec = read_spec(path)
    config = load_config(path)
    arch = find_architecture(config.model_type)
    files = WeightFiles(path)
    check_weights(path, config, files, spec)
    network: Any = meta_model(config)
    network.to(dtype)  # whatever config.json calls the dtype, nothing is rounded on the way in
    state = {}
    blocks = network.get_submodule(arch.blocks)
    if spec is None:
        ModelSource(path)  # refuses missing, unknown and misshapen tensors
        state = {n: files.tensor(n) for n in network.state_dict() if n in files}
    else:
        for i, layer in enumerate(blocks):
            prefix = f"{arch.blocks}.{i}."
            names = [n for n in files.names if n.startswith(prefix)]
            tensors = {n.removeprefix(prefix): files.tensor(n).to(device) for n in names}
            try:
                install_block(layer, tensors, spec, arch)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{path}: {prefix[:-1]} cannot be built ({error})") from None
        state = {n: files.tensor(n) for n in files.names if not n.startswith(arch.blocks + ".")}
        if spec.lm_head_bits < 16:
            network.lm_head = ReferenceHead(state.pop(PACKED), state.pop(SCALE))
    network.load_state_dict(state, assign=True, strict=False)
    if getattr(config, "tie_word_embeddings", False):
        network.tie_weights()
    left = [n for n, p in network.named_parameters() if p.is_meta]
    if left:
        raise UserError(f"{path} lacks tensor {left[0]}; the checkpoint is incomplete, make it again")
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network.to(device).eval()
