"""A finished block whose own checkpoint tensors are trainable: what is trained is what is written.

Nothing is inverted any more: on-line factors and rounded weights are separate numbers of the checkpoint and
move separately, so no step can make anything singular.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.kron import kron_wide_ref
from ..kernels.pack import pack_codes, unpack_codes
from ..kernels.quantize import codes_ref, fake_quant_kv_ref
from ..sites import SITES, factor_name
from ..spec import FlatQuantSpec
from .architectures import Architecture
from .block import set_submodule
from .straight_through import fake_quantize, round_ste
from .weights import grouped

Form = Literal["linear", "log", "logit"]
EDGE = 0.499
"""How far from its code a latent weight may start, in quantization steps."""


def form_of(name: str) -> Form:
    """How the tensor ``name`` changes: see ``Tunable``."""
    if name.endswith(".clip"):
        return "logit"
    return "log" if name.endswith(("weight_scale", "norm.weight")) else "linear"


class Tunable(nn.Module):
    """A checkpoint tensor and its trainable change.

    The change starts at 0 and has no unit, so that one learning rate suits all: ``linear`` is
    ``base + rms(base) * change``, ``log`` is ``base * exp(change)``, ``logit`` is
    ``sigmoid(logit(base) + change)``. The result is rounded to ``dtype`` (None: float32), straight through.
    """

    base: Tensor
    unit: Tensor

    def __init__(self, base: Tensor, form: Form, dtype: torch.dtype | None):
        super().__init__()
        self.form, self.dtype = form, dtype
        base = base.detach().float()
        self.register_buffer("base", base)
        self.register_buffer("unit", base.square().mean().sqrt().clamp(min=1e-12))
        self.change = nn.Parameter(torch.zeros_like(base))

    def forward(self) -> Tensor:
        """The present value, float32."""
        if self.form == "linear":
            value = self.base + self.unit * self.change
        elif self.form == "log":
            value = self.base * self.change.exp()
        else:
            value = (self.base.logit(1e-6) + self.change).sigmoid()
        if self.dtype is None:
            return value
        return value + (value.to(self.dtype).float() - value).detach()


class StudentSite(nn.Module):
    """A transform site as ``ReferenceSite`` computes it, with gradients; the last result is kept."""

    def __init__(self, left: Tunable | None, right: Tunable | None, clip: Tunable | None, bits: int):
        super().__init__()
        self.left, self.right, self.clip, self.bits = left, right, clip, bits
        self._memo: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Drop the last result; call after each step."""
        self._memo = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized transformed activations, shape of x [..., K]."""
        if self._memo is None or self._memo[0] is not x:
            left = self.left() if self.left is not None else None
            right = self.right() if self.right is not None else None
            z = kron_wide_ref(x, left, right)
            if self.clip is not None:
                clip = self.clip()
                z = fake_quantize(z.unflatten(-1, (len(clip), -1)), self.bits, clip).flatten(-2)
            self._memo = x, z
        return self._memo[1]


class StudentLinear(nn.Module):
    """A rounded linear layer: ``weight = clamp(round(steps)) * scale``.

    steps: the latent weight in quantization steps [out, groups, group_size]. It starts where the weight
    lay before rounding, or at the code where the rounding was not to the nearest (GPTQ): at the edge, every such
    weight would flip in the first steps.
    """

    def __init__(
        self,
        site: StudentSite,
        codes: Tensor,
        scale: Tunable,
        bias: Tunable | None,
        latent: Tensor | None,
        bits: int,
    ):
        super().__init__()
        self.site, self.scale, self.bias = [site], [scale], [bias]  # owned by the block
        self.bits = bits
        width = codes.shape[1] // scale.base.shape[1]
        steps = grouped(codes.float(), width)
        if latent is not None:
            exact = grouped(latent, width) / scale.base.to(latent.dtype).unsqueeze(-1)
            offset = (exact - steps).float()
            steps = steps + torch.where(offset.abs() > 0.5, 0.0, offset.clamp(-EDGE, EDGE))
        self.steps = nn.Parameter(steps)

    def codes(self) -> Tensor:
        """Present codes, floating point [out, groups, group_size]."""
        return codes_ref(self.steps, self.steps.new_ones(()), self.bits, round_ste)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = (self.codes() * self.scale[0]().unsqueeze(-1)).flatten(-2)
        bias = self.bias[0]() if self.bias[0] is not None else None
        return F.linear(self.site[0](x), weight, bias)


class StudentKV(nn.Module):
    """``ReferenceKV`` with gradients. q [B, H, T, D], k and v [B, KV, T, D]."""

    def __init__(self, values: dict[str, Tunable], spec: FlatQuantSpec):
        super().__init__()
        self.values, self.kv = values, spec.kv

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Transformed and fake-quantized q, k, v."""
        value = self.values
        if self.kv.k_bits < 16:
            q, k = q @ value["k_transform.inverse_t"](), k @ value["k_transform.matrix"]()
            k = fake_quant_kv_ref(k, self.kv.k_bits, value["k_transform.clip"](), round_ste)
        if self.kv.v_bits < 16:
            v = fake_quant_kv_ref(v, self.kv.v_bits, value["v_transform.clip"](), round_ste)
        return q, k, v


class StudentBlock(nn.Module):
    """A decoder layer that computes a finished block, with every tensor of it trainable.

    layer: the unquantized decoder layer, changed in place. tensors: the block's checkpoint tensors by
    relative name. latents: linear name -> weight [out, in] before rounding, or empty (the latent weights
    then start at their codes). scale_dtype: the type that weight scales are rounded to, or None.
    """

    def __init__(
        self,
        layer: nn.Module,
        tensors: dict[str, Tensor],
        latents: dict[str, Tensor],
        spec: FlatQuantSpec,
        arch: Architecture,
        scale_dtype: torch.dtype | None,
    ):
        super().__init__()
        self.layer, self.arch = [layer], arch
        self.tensors = {n: t for n, t in tensors.items()}
        device = next(layer.parameters()).device
        self.values = nn.ModuleDict()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                kept: torch.dtype | None = tensor.dtype if tensor.dtype != torch.float32 else None
                if name.endswith((".left", ".right", ".head")):
                    kept = torch.bfloat16
                elif name.endswith(".weight_scale"):
                    kept = scale_dtype
                self.values[name.replace(".", "/")] = Tunable(tensor.to(device), form_of(name), kept)
        self.sites = nn.ModuleDict()
        self.linears = nn.ModuleDict()
        for place, group in zip(SITES, arch.groups, strict=True):
            owner = f"{place.module.partition('.')[0]}."
            left, right, clip = (
                self.value(owner + factor_name(place, f"transform_{kind}"))
                for kind in ("left", "right", "clip")
            )
            site = StudentSite(left, right, clip, spec.activations.bits)
            self.sites[place.name] = site
            for name in group:
                scale, bias = self.value(f"{name}.weight_scale"), self.value(f"{name}.bias")
                assert scale is not None
                codes = unpack_codes(tensors[f"{name}.weight_packed"].to(device), spec.weights.bits)
                latent = latents[name].to(device) if name in latents else None
                linear = StudentLinear(site, codes, scale, bias, latent, spec.weights.bits)
                self.linears[name.replace(".", "/")] = linear
                set_submodule(layer, name, linear)
        own = {n for n, _ in layer.named_parameters()}
        self.plain = [n for n in tensors if n in own]  # norms: they stay the layer's own modules
        attention: Any = layer.get_submodule(arch.attention)
        prefix = f"{arch.attention}."
        kv = {n.removeprefix(prefix): self.value(n) for n in tensors if n.startswith(prefix)}
        attention.flatquant_qkv = StudentKV({n: v for n, v in kv.items() if v is not None}, spec).forward
        self.to(device)

    def value(self, name: str) -> Tunable | None:
        """The tunable tensor of that name, None if the block has none."""
        key = name.replace(".", "/")
        if key not in self.values:
            return None
        return cast(Tunable, self.values[key])

    def forward(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Output [N, T, hidden] for x [N, T, hidden]; kwargs: the layer's other arguments."""
        for site in self.sites.values():
            site.forget()  # type: ignore[operator]
        norms = {n: self.values[n.replace(".", "/")]() for n in self.plain}
        return torch.func.functional_call(self.layer[0], norms, (x,), kwargs)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """The checkpoint tensors of the present state, with the names and dtypes that came in."""
        out = dict(self.tensors)
        for key, tunable in self.values.items():
            name = key.replace("/", ".")
            out[name] = tunable().to(self.tensors[name].dtype)
        for key, linear in self.linears.items():
            codes: Tensor = linear.codes()  # type: ignore[operator]
            bits = cast(StudentLinear, linear).bits
            out[f"{key.replace('/', '.')}.weight_packed"] = pack_codes(
                codes.flatten(-2).to(torch.int8), bits
            )
        return out
