"""A decoder block with every FlatQuant transform and clip trainable."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.quantize import fake_quant_kv_ref
from ..sites import SITE_NAMES
from .architectures import Architecture
from .factors import factor_pair
from .matrices import MATRICES, AffineMatrix
from .recipe import Recipe
from .shards import choose_shards
from .sites import ClipRatio, Matrices, Site
from .straight_through import recomputed, round_ste
from .weights import WeightClip, fake_quantize_weight, grouped


@dataclass
class Stats:
    """Largest absolute input of each channel in the full-precision block, float32 [width]."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class TrainableLinear(nn.Module):
    """A linear layer with transformed, clipped, fake-quantized weight behind a shared Site."""

    def __init__(self, linear: nn.Linear, site: Site, recipe: Recipe):
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = linear.bias.detach() if linear.bias is not None else None
        self.recipe, self.weight_bits = recipe, recipe.weight_bits
        groups = grouped(self.weight, recipe.group_size).shape[1]
        self.clip = WeightClip(self.weight.shape[0], groups) if recipe.weight_clip else None
        self.site = [site]  # a list keeps the shared site out of this module's parameters
        self.value: list[Value] = []  # P_v: of v_proj's output, or of o_proj's input
        self.is_value_output = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]. The weight's way there is many tensors of its size: they are made again."""
        p = inv_t = None
        if self.value and self.is_value_output:
            p = self.value[0].matrix_of_rows()
        elif self.value:
            inv_t = self.value[0].input_inv_t()
        return recomputed(self._product, self.site[0](x), self.site[0].matrices(), p, inv_t)

    def _product(self, z: Tensor, matrices: Matrices, p: Tensor | None, inv_t: Tensor | None) -> Tensor:
        """The product with the transformed, clipped and rounded weight, and with the bias that goes with it."""
        weight, bias = self.site[0].transform_weight(self.weight, matrices, inv_t), self.bias
        if self.clip is not None:
            weight = self.clip(weight, self.recipe.group_size)
        if self.value and self.is_value_output:
            weight = self.value[0].rows(weight, p)
            bias = self.value[0].rows(bias[:, None], p)[:, 0] if bias is not None else None
        weight = fake_quantize_weight(weight, self.weight_bits, self.recipe.group_size)
        return F.linear(z, weight, bias)


def right_multiply_rows(weight: Tensor, p: Tensor) -> Tensor:
    """Weight [heads * d, in] whose output per head is multiplied by P from the right; P [1 or heads, d, d]."""
    heads = weight.unflatten(0, (-1, p.shape[-1]))
    return torch.einsum("hde,hdi->hei", p.to(weight.dtype).expand(len(heads), -1, -1), heads).flatten(
        0, 1
    )


class Value(nn.Module):
    """What happens to each value head between v_proj and o_proj, merged into both: the o site's diagonal,
    then P_v [1 or KV heads, d, d] (None: nothing)."""

    def __init__(self, matrix: nn.Module | None, o: Site, heads: int):
        super().__init__()
        self.matrix = matrix
        self.o = [o]
        self.heads = heads

    def matrix_of_rows(self) -> Tensor | None:
        """P_v, None if there is none."""
        return self.matrix()[0] if self.matrix is not None else None

    def rows(self, weight: Tensor, p: Tensor | None) -> Tensor:
        """v_proj's weight (or bias as a column) [KV heads * d, in] with diagonal and P_v merged."""
        diag = self.o[0].own_diag
        if diag is not None:
            weight = weight * diag.to(weight.dtype)[:, None]
        return right_multiply_rows(weight, p) if p is not None else weight

    def input_inv_t(self, exact: bool = False) -> Tensor | None:
        """P_v^-T as the right factor of o_proj's weight: [S, d, d] behind the head-axis matrix, which needs
        one P_v for all heads, else [query heads, d, d]. exact: inverted anew, in float64."""
        if self.matrix is None:
            return None
        p, inv_t = self.matrix()
        if exact:
            inv_t = torch.linalg.inv(p.double()).mT
        if self.o[0].left is not None:
            return inv_t.expand(self.o[0].shards, -1, -1)
        return inv_t.repeat_interleave(self.heads // len(inv_t), 0)


class KVTransform(nn.Module):
    """P_h on queries and keys after RoPE, and the quantization of keys and values."""

    def __init__(self, head_dim: int, recipe: Recipe, generator: torch.Generator):
        super().__init__()
        self.recipe = recipe
        kind = recipe.matrix if "k" in recipe.transforms else "identity"
        self.k = MATRICES[kind](1, head_dim, generator) if recipe.k_bits < 16 else None
        self.k_clip = self._clip(recipe.k_bits)
        self.v_clip = self._clip(recipe.v_bits)

    def _clip(self, bits: int) -> ClipRatio | None:
        return None if bits == 16 else ClipRatio(1 if bits == 8 else 2, self.recipe.kv_clip)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D], k and v [B, KV, T, D]."""
        if self.k is not None and self.k_clip is not None:
            p, p_inv_t = self.k()
            q, k = q @ p_inv_t[0], k @ p[0]
            k = fake_quant_kv_ref(k, self.recipe.k_bits, self.k_clip(), round_ste)
        if self.v_clip is not None:
            v = fake_quant_kv_ref(v, self.recipe.v_bits, self.v_clip(), round_ste)
        return q, k, v


class TrainableBlock(nn.Module):
    """Wraps a decoder layer in place: its linears become TrainableLinear, its attention gets the KV hook.

    layer: a Transformers decoder layer with float32 weights. stats: channel maxima that start the
    diagonals at ``max|W|**(1-alpha) / max|x|**alpha`` (SmoothQuant's rule, alpha 0.3 in FlatQuant).
    """

    def __init__(self, layer: nn.Module, arch: Architecture, recipe: Recipe, stats: Stats, seed: int):
        super().__init__()
        self.arch, self.recipe = arch, recipe
        device = next(layer.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        linears = {name: cast(nn.Linear, layer.get_submodule(name)) for name in arch.linears}
        attention: Any = layer.get_submodule(arch.attention)
        head_dim: int = attention.head_dim
        heads = linears[arch.o].in_features // head_dim
        kv_heads = linears[arch.qkv[1]].out_features // head_dim
        shards = choose_shards(recipe, heads, kv_heads, linears[arch.down].in_features)

        def make_site(
            name: str, names: tuple[str, ...], shards: int, amax: Tensor, repeat: int = 0
        ) -> Site:
            width = linears[names[0]].in_features
            left, right = None, None
            if name in recipe.transforms:
                left, right = (
                    (heads // shards, None)
                    if name == "o"
                    else factor_pair(width // shards, f"input width of {names[0]}", recipe.widest_factor)
                )
            diag = None
            if name in recipe.diag:
                weights = [linears[n].weight for n in names]
                wmax = channel_maxima(torch.cat(weights), recipe.diag_rows == "normalized")
                if repeat:  # one number for the query heads that share a KV head
                    wmax, amax = (
                        t.view(kv_heads, repeat, head_dim).amax(dim=1).flatten() for t in (wmax, amax)
                    )
                diag = smooth_diag(wmax, amax, recipe.diag_alpha)
            return Site(
                shards, left, right, recipe.activation_bits, recipe.matrix, generator, diag,
                repeat, head_dim, recipe.activation_clip,
            )  # fmt: skip

        self.sites = nn.ModuleDict(
            {
                "qkv": make_site("qkv", arch.qkv, 1, stats.qkv),
                "o": make_site("o", (arch.o,), shards, stats.o, heads // kv_heads),
                "gate_up": make_site("gate_up", arch.gate_up, 1, stats.gate_up),
                "down": make_site("down", (arch.down,), shards, stats.down),
            }
        )
        matrix = None
        if "v" in recipe.transforms:
            kind = recipe.v_matrix or recipe.matrix
            matrix = MATRICES[kind](kv_heads if recipe.v_each_head else 1, head_dim, generator)
        self.value = Value(matrix, self.site("o"), heads)
        self.kv = KVTransform(head_dim, recipe, generator)
        self.linears = nn.ModuleDict()
        for group, site_name in zip(arch.groups, SITE_NAMES, strict=True):
            for name in group:
                linear = TrainableLinear(linears[name], self.site(site_name), recipe)
                self.linears[name.replace(".", "/")] = linear
                set_submodule(layer, name, linear)
        for name, is_output in ((arch.qkv[2], True), (arch.o, False)):
            self.linear(name).value, self.linear(name).is_value_output = [self.value], is_output
        attention.flatquant_qkv = self.kv.forward
        self.layer = [layer]
        self.device = device
        self.to(device)

    def linear(self, name: str) -> TrainableLinear:
        """The trainable linear of that name."""
        return cast(TrainableLinear, self.linears[name.replace(".", "/")])

    def site(self, name: str) -> Site:
        """The trainable site of that name."""
        return cast(Site, self.sites[name])

    def forget(self) -> None:
        """Drop everything kept for the last step."""
        for name in self.sites:
            self.site(name).forget()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Tell the matrices that change with time how much of the training has passed."""
        for module in self.modules():
            if isinstance(module, AffineMatrix):
                module.begin_epoch(epoch, epochs)

    def parameter_groups(self, lr: float, clip_factor: float) -> list[dict]:
        """Optimizer groups: transforms and diagonals at ``lr``, clips at ``lr * clip_factor``."""
        clips = [p for n, p in self.named_parameters() if n.endswith("_logit")]
        rest = [p for n, p in self.named_parameters() if not n.endswith("_logit")]
        return [{"params": rest, "lr": lr}, {"params": clips, "lr": lr * clip_factor}]


def channel_maxima(weight: Tensor, normalized: bool) -> Tensor:
    """Largest absolute weight of each input channel of [out, in]; normalized: in units of its row's largest."""
    size = weight.detach().abs()
    if normalized:
        size = size / size.amax(dim=1, keepdim=True).clamp(min=1e-30)
    return size.amax(dim=0)


def smooth_diag(wmax: Tensor, xmax: Tensor, alpha: float) -> Tensor:
    """``wmax**(1-alpha) / xmax**alpha`` with both floored at 1e-5, [width]."""
    return wmax.clamp(min=1e-5) ** (1 - alpha) / xmax.clamp(min=1e-5) ** alpha


def set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule ``name`` (dotted) of ``root``."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
