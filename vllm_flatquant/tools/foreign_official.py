"""The official FlatQuant code: ``flat_matrices.pth`` beside the original model, and RealQuant folders."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.architectures import Architecture
from ..calibration.block import right_multiply_rows
from ..calibration.card import public_name
from ..calibration.errors import UserError
from ..calibration.fold import fold_norm, inverse_transpose, round_factor
from ..calibration.rounding import rtn
from ..calibration.source import ModelSource, WeightFiles, read_config, resolve_folder
from ..calibration.weights import Grid
from ..kernels.kron import kron_wide_ref
from ..kernels.pack import pack_codes
from .foreign import OWNERS, Clips, ForeignModel, base_config, base_name, make_spec, need

TRANSFORMS = {
    "qkv": "self_attn.ln_trans",
    "o": "self_attn.o_trans",
    "gate_up": "mlp.up_gate_trans",
    "down": "mlp.down_trans",
}
"""Our site -> the official name of its transform."""

Block = dict[str, Tensor]


def read_matrices(file: Path, model: str | None, scheme: str | None, kv: int | None) -> ForeignModel:
    """``flat_matrices.pth`` (block number -> name -> tensor) with the original model's folder.

    The file is a pickle: it is read with ``weights_only``, and refused if it holds more than tensors.
    Weights are folded with the transforms rounded to bf16 and inverted anew, and rounded to nearest.
    """
    if model is None or scheme is None or kv is None:
        raise UserError(
            f"{file} holds transforms alone, and neither weights nor bit widths; add --model ORIGINAL --scheme "
            "w4a4 --kv 16, as it was trained"
        )
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{file} is a pickle that holds more than tensors, or is damaged ({type(error).__name__}); it is not "
            "loaded, because a pickle can run code: copy it again, or save its tensors alone"
        ) from None
    source = ModelSource(model)
    blocks = _blocks(file, stored, source.num_blocks)
    config, arch = base_config(source.raw_config)
    sizes: dict[str, tuple[int, ...]] = {}
    for site, name in TRANSFORMS.items():
        if f"{name}.matrix_left" in blocks[0]:
            sizes[site] = tuple(len(blocks[0][f"{name}.matrix_{s}"]) for s in ("left", "right"))
        elif f"{name}.matrix" in blocks[0]:
            sizes[site] = (len(blocks[0][f"{name}.matrix"]),)
        else:
            raise UserError(
                f"{file} lacks {name}; it was trained without that transform, which is not supported"
            )
    if kv == 4:
        sizes["k"] = (len(_get(file, blocks[0], "self_attn.kcache_trans.matrix")),)
    spec = make_spec(scheme, kv, sizes, "official flat_matrices")
    found = ForeignModel(
        config=config,
        side=source.path,
        base=public_name(model),
        origin="Converted from transforms that the official FlatQuant code trained (`flat_matrices.pth`); the "
        "weights are rounded to nearest.",
        spec=spec,
        tensors=iter(()),
    )

    def tensors() -> Iterator[Block]:
        clips = Clips()
        for i, block in enumerate(blocks):
            new = _fold(file, block, source.block_tensors(i), arch, found, clips)
            yield {source.block_prefix(i) + name: tensor for name, tensor in new.items()}
        yield {name: source.files.tensor(name) for name in source.other_names()}
        found.notes += clips.notes()

    found.tensors = tensors()
    return found


def _blocks(file: Path, stored: Any, count: int) -> list[Block]:
    if not isinstance(stored, dict) or set(stored) != set(range(count)):
        raise UserError(
            f"{file} does not hold {count} blocks as the model has; it belongs to another model"
        )
    if not all(
        isinstance(b, dict) and all(isinstance(t, Tensor) for t in b.values()) for b in stored.values()
    ):
        raise UserError(f"{file} is no flat_matrices.pth of the official FlatQuant code")
    return [stored[i] for i in range(count)]


def _get(file: Path, block: Block, name: str) -> Tensor:
    if name not in block:
        raise UserError(
            f"{file} lacks {name}; it was trained with other settings than --scheme and --kv say"
        )
    return block[name].double()


def _fold(
    file: Path, block: Block, source: Block, arch: Architecture, found: ForeignModel, clips: Clips
) -> Block:
    """One block's checkpoint tensors by relative name: the official order of steps, in float64."""
    spec, out = (
        found.spec,
        {n: t for n, t in source.items() if n.removesuffix(".weight") not in arch.linears},
    )
    value = _get(file, block, "self_attn.vcache_trans.matrix")
    down_diag = block.get("mlp.down_trans.diag_scale")
    for site, group in zip(TRANSFORMS, arch.groups, strict=True):
        name, ours = TRANSFORMS[site], f"{OWNERS[site]}.{site}_transform"
        if site == "o":
            left = round_factor(_get(file, block, f"{name}.matrix"))
            out[f"{ours}.head"] = left.float()[None]
            inverses = inverse_transpose(left)[None], inverse_transpose(value)[None]
        else:
            left, right = (
                round_factor(_get(file, block, f"{name}.matrix_{s}")) for s in ("left", "right")
            )
            out[f"{ours}.left"], out[f"{ours}.right"] = left.float()[None], right.float()[None]
            inverses = inverse_transpose(left)[None], inverse_transpose(right)[None]
        if spec.activations.bits < 16:
            out[f"{ours}.clip"] = clips.merge(
                [r for linear in group for r in _ratios(block, f"{linear}.act_quantizer.clip_factor_a")]
            )
        diag = block.get(f"{name}.diag_scale")
        if diag is not None and site in ("qkv", "gate_up"):
            norm = f"{arch.input_norm if site == 'qkv' else arch.post_norm}.weight"
            out[norm], diag = fold_norm(source[norm], diag.double())
        for linear in group:
            weight, bias = source[f"{linear}.weight"].double(), source.get(f"{linear}.bias")
            weight = kron_wide_ref(weight if diag is None else weight / diag.double(), *inverses)
            weight = _clip_weight(block, linear, weight)
            wide = bias.double() if bias is not None else None
            if linear == arch.qkv[2]:
                weight = right_multiply_rows(weight, value[None])
                wide = (
                    right_multiply_rows(wide[:, None], value[None])[:, 0] if wide is not None else None
                )
            if linear == arch.gate_up[1] and down_diag is not None:
                weight = weight * down_diag.double()[:, None]
                wide = wide * down_diag.double() if wide is not None else None
            grid = Grid(spec.weights.bits, dtype=_scale_dtype(spec.activations.bits, source))
            scale = grid.scale(weight)
            codes = rtn(weight, scale, grid.bits)
            out[f"{linear}.weight_packed"] = pack_codes(codes, spec.weights.bits)
            out[f"{linear}.weight_scale"] = scale
            if wide is not None and bias is not None:
                out[f"{linear}.bias"] = wide.to(bias.dtype)
    if spec.kv.k_bits < 16:
        out |= _cache(block, _get(file, block, "self_attn.kcache_trans.matrix").float())
    return out


def _scale_dtype(bits: int, source: Block) -> torch.dtype | None:
    """W4A16 scales are values of the model's 16-bit type (docs/format.md)."""
    if bits < 16:
        return None
    dtype = source["self_attn.o_proj.weight"].dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def _ratios(tensors: Any, name: str) -> list[float]:
    """Maximum's and minimum's clip ratio after the sigmoid; 1 where they were not trained."""
    both = [f"{name}_max", f"{name}_min"]
    return [float(tensors[n].double().sigmoid()) if n in tensors else 1.0 for n in both]


def _clip_weight(block: Block, linear: str, weight: Tensor) -> Tensor:
    """The official learnable weight clipping: each row clamped to (ratio * minimum, ratio * maximum)."""
    if f"{linear}.clip_factor_w_max" not in block:
        return weight
    high, low = (block[f"{linear}.clip_factor_w_{s}"].double().sigmoid() for s in ("max", "min"))
    top, bottom = weight.amax(1, keepdim=True) * high, weight.amin(1, keepdim=True) * low
    return torch.minimum(torch.maximum(weight, bottom), top)


def _cache(block: Any, matrix: Tensor, inverse_t: Tensor | None = None) -> Block:
    """K's transform and both clips (maximum, minimum), by name relative to the block."""
    inverse = inverse_transpose(matrix.double()) if inverse_t is None else inverse_t
    found = {
        "self_attn.k_transform.matrix": matrix,
        "self_attn.k_transform.inverse_t": inverse.float(),
    }
    for kind in ("k", "v"):
        ratios = _ratios(block, f"self_attn.{kind}_cache_quantizer.clip_factor_a")
        found[f"self_attn.{kind}_transform.clip"] = torch.tensor(ratios)
    return found


def read_realquant(path: Path, model: str | None, scheme: str | None, kv: int | None) -> ForeignModel:
    """A folder of the official code's quantized weights: int4 codes in our packing, transforms in fp16.

    model: has config.json and the tokenizer where the folder, as that code writes it, has not.
    """
    if scheme is None or kv is None:
        raise UserError(
            f"{path} (RealQuant) does not record the bits of activations and KV cache; add --scheme w4a4 --kv 4, "
            "as it was made"
        )
    if model is None and not (path / "config.json").is_file():
        raise UserError(f"{path} (RealQuant) has no config.json; add --model ORIGINAL, whose it takes")
    side = resolve_folder(model) if model else path
    raw = read_config(side)
    config, arch = base_config(raw)
    config.pop("torch_dtype", None)
    config["dtype"] = "float16"  # what its runtime computes in, and what its norms are stored in
    files = WeightFiles(path)
    first = f"{arch.blocks}.0."
    sizes: dict[str, tuple[int, ...]] = {}
    for site, name in TRANSFORMS.items():
        if site == "o":
            sizes[site] = (len(need(files, f"{first}{name}.matrix")),)
        else:
            sizes[site] = tuple(len(need(files, f"{first}{name}.matrix_{s}")) for s in ("left", "right"))
    if kv == 4:
        sizes["k"] = (len(need(files, f"{first}self_attn.kcache_trans.matrix")),)
    spec = make_spec(scheme, kv, sizes, "official RealQuant", "float16")
    if spec.weights.bits != 4:
        raise UserError(f"{path} holds 4-bit weights; --scheme {scheme} does not")
    found = ForeignModel(
        config=config,
        side=side,
        base=public_name(model) if model else base_name(raw, path),
        origin="Converted from quantized weights that the official FlatQuant code saved (RealQuant).",
        spec=spec,
        tensors=iter(()),
    )
    if kv == 4:
        found.notes.append(
            "keys and values use the clips that were trained; RealQuant's own runtime stores but ignores them"
        )

    def tensors() -> Iterator[Block]:
        clips = Clips()
        for i in range(config["num_hidden_layers"]):
            prefix = f"{arch.blocks}.{i}."
            new = _realquant_block(files, prefix, arch, found, clips)
            yield {prefix + name: tensor for name, tensor in new.items()}
        quantized = (f"{arch.blocks}.", "quantizer.")
        yield {n: files.tensor(n) for n in files.names if not n.startswith(quantized)}
        found.notes += clips.notes()

    found.tensors = tensors()
    return found


def _realquant_block(
    files: WeightFiles, prefix: str, arch: Architecture, found: ForeignModel, clips: Clips
) -> Block:
    """One block's tensors by relative name. Diagonals, v's transform and weight clips are folded already."""
    out: Block = {}
    stored = {n.removeprefix(prefix): n for n in files.names if n.startswith(prefix)}
    block = {
        n: files.tensor(full)
        for n, full in stored.items()
        if ".clip_factor_a" in n or n.endswith("norm.weight")
    }
    out |= {n: t for n, t in block.items() if n.endswith("norm.weight")}
    for site, group in zip(TRANSFORMS, arch.groups, strict=True):
        ours = f"{OWNERS[site]}.{site}_transform"
        for part in ("matrix",) if site == "o" else ("matrix_left", "matrix_right"):
            last = "head" if site == "o" else part.removeprefix("matrix_")
            out[f"{ours}.{last}"] = need(files, f"{prefix}{TRANSFORMS[site]}.{part}").float()[None]
        if found.spec.activations.bits < 16:
            out[f"{ours}.clip"] = clips.merge(
                [r for linear in group for r in _ratios(block, f"{linear}.act_quantizer.clip_factor_a")]
            )
        for linear in group:
            packed = need(files, f"{prefix}{linear}.linear.weight")
            quantizer = f"quantizer.{prefix}{linear}.linear"
            if packed.dtype != torch.uint8:
                raise UserError(
                    f"{files.path}: {prefix}{linear} is not quantized ({packed.dtype}); convert transforms and the "
                    "original model with --model instead"
                )
            zero = f"{quantizer}.zero"
            if zero in files and bool(files.tensor(zero).any()):
                raise UserError(f"{files.path}: {prefix}{linear} is asymmetric, which is not supported")
            scale = need(files, f"{quantizer}.scale").float()
            if scale.shape != (packed.shape[0], 1):
                raise UserError(
                    f"{files.path}: {quantizer}.scale has shape {list(scale.shape)}: scales of groups are not "
                    "saved right by that code; quantize the original model"
                )
            out[f"{linear}.weight_packed"], out[f"{linear}.weight_scale"] = packed, scale
            if f"{linear}.linear.bias" in stored:
                out[f"{linear}.bias"] = files.tensor(stored[f"{linear}.linear.bias"])
    if found.spec.kv.k_bits < 16:
        k = f"{prefix}self_attn.kcache_trans"
        out |= _cache(
            block, need(files, f"{k}.matrix").float(), need(files, f"{k}.matrix_inv_t").float()
        )
    return out
