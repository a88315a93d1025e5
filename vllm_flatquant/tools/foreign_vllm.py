"""FlatQuant folders of other vLLM plug-ins: SqueezeBits' W4A16, and vllm-ascend's W4A4_FLATQUANT_DYNAMIC."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.architectures import Architecture
from ..calibration.errors import UserError
from ..calibration.source import WeightFiles, folder_file, read_config, read_json
from ..errors import shown
from ..kernels.kron import kron_wide_ref
from ..kernels.pack import pack_int4
from .foreign import OWNERS, Clips, ForeignModel, base_config, base_name, make_spec, need

Block = dict[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

MODULES = {
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
"""Our site -> the vLLM module beside whose name SqueezeBits stores its transform."""


def unpack_int32(packed: Tensor, columns: int) -> Tensor:
    """Codes int8 [N, columns] of int32 [N, ceil(columns / 8)]: eight values of 4 bits, lowest bits first,
    each with 8 added (compressed-tensors, "pack-quantized")."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((packed.unsqueeze(-1) >> shifts) & 0xF).flatten(1)[:, :columns] - 8
    return codes.to(torch.int8)


def read_squeezebits(path: Path) -> ForeignModel:
    """A SqueezeBits folder: weights as compressed-tensors packs them, transforms in bf16, 16-bit activations.

    Its scales repeat one scale of a row for each group of 128; where they do, one scale a row is kept.
    """
    raw = read_config(path)
    _check_w4a16(path, raw["quantization_config"])
    config, arch = base_config(raw)
    files = WeightFiles(path)
    first = f"{arch.blocks}.0."
    sizes: dict[str, tuple[int, ...]] = {}
    for site, module in MODULES.items():
        left = need(files, f"{first}{module}.flatquant_left")
        right = f"{first}{module}.flatquant_right"
        sizes[site] = (len(left), len(need(files, right))) if site != "o" else (len(left),)
    blocks = [f"{arch.blocks}.{i}." for i in range(config["num_hidden_layers"])]
    linears = [f"{prefix}{linear}" for prefix in blocks for linear in arch.linears]
    repeated = all(_repeats(need(files, f"{name}.weight_scale")) for name in linears)
    group = None
    if not repeated:
        shape = need(files, f"{linears[0]}.weight_shape").tolist()
        group = shape[1] // files.shape(f"{linears[0]}.weight_scale")[1]
    found = ForeignModel(
        config=config,
        side=path,
        base=base_name(raw, path),
        origin="Converted from a SqueezeBits FlatQuant W4A16 folder.",
        spec=make_spec("w4a16", 16, sizes, "SqueezeBits W4A16", group_size=group),
        tensors=iter(()),
    )

    def tensors() -> Iterator[Block]:
        for prefix in blocks:
            yield _squeezebits_block(files, prefix, arch, repeated)
        yield {n: files.tensor(n) for n in files.names if not n.startswith(f"{arch.blocks}.")}

    found.tensors = tensors()
    return found


def _check_w4a16(path: Path, quantization: dict) -> None:
    """UserError if the ``quantization_config`` says anything but symmetric 4-bit weights in their own order."""
    groups = quantization.get("config_groups")
    found = [quantization, *groups.values()] if isinstance(groups, dict) and groups else []
    found += [group.get("weights") for group in found[1:] if isinstance(group, dict)]
    if len(found) < 3 or len(found) % 2 == 0 or not all(isinstance(part, dict) for part in found):
        raise UserError(f"{path}: config_groups of quantization_config is damaged; download it again")
    wanted = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "actorder": None,
        "input_activations": None,
        "kv_cache_scheme": None,
    }
    for key, value in wanted.items():
        for part in found:
            # Static act-order ("weight") moves no column of the stored weight.
            if part.get(key, value) not in (value, "weight" if key == "actorder" else value):
                raise UserError(
                    f"{path}: {key} is {shown(part[key], 40)} there and must be {value}: only symmetric 4-bit weights "
                    "with 16-bit activations can be converted; quantize the original model"
                )


def _repeats(scale: Tensor) -> bool:
    """Whether every group of a row has the same scale."""
    return bool((scale == scale[:, :1]).all())


def _squeezebits_block(files: WeightFiles, prefix: str, arch: Architecture, repeated: bool) -> Block:
    out: Block = {}
    for site, module in MODULES.items():
        ours = f"{prefix}{OWNERS[site]}.{site}_transform"
        left = need(files, f"{prefix}{module}.flatquant_left").float()[None]
        out[f"{ours}.head" if site == "o" else f"{ours}.left"] = left
        if site != "o":
            out[f"{ours}.right"] = need(files, f"{prefix}{module}.flatquant_right").float()[None]
    for linear in arch.linears:
        name = f"{prefix}{linear}"
        rows, columns = need(files, f"{name}.weight_shape").tolist()
        codes = unpack_int32(need(files, f"{name}.weight_packed"), columns)
        if len(codes) != rows:
            raise UserError(f"{files.path}: {name}.weight_packed has {len(codes)} rows, not {rows}")
        scale = need(files, f"{name}.weight_scale").float()
        out[f"{name}.weight_packed"] = pack_int4(codes)
        out[f"{name}.weight_scale"] = scale[:, :1] if repeated else scale
    mine = {name for name in out}
    for name in files.names:
        if not name.startswith(prefix) or name in mine or "flatquant_" in name:
            continue
        short = name.replace(".linear.bias", ".bias")
        if name.endswith(".weight_shape") or ".clip_factor_a" in name:
            continue  # sizes, and activation clips that 16-bit activations do not use
        out[short] = files.tensor(name)
    return out


ASCEND = "W4A4_FLATQUANT_DYNAMIC"


def read_ascend(path: Path) -> ForeignModel:
    """A folder of msmodelslim for vllm-ascend, whose layers of type W4A4_FLATQUANT_DYNAMIC become ours.

    Layers of type FLOAT or W8A8_DYNAMIC, and an o_proj whose transform is no head-axis matrix, become
    16-bit layers listed in ``ignore``: more accurate and larger, which the notes say.
    """
    types = _ascend_types(path)
    raw = read_config(path)
    config, arch = base_config(raw)
    files = WeightFiles(path)
    heads = int(config["num_attention_heads"])
    sizes: dict[str, tuple[int, ...]] = {}
    wide: list[str] = []
    for i in range(config["num_hidden_layers"]):
        prefix = f"{arch.blocks}.{i}."
        for site, group in zip(OWNERS, arch.groups, strict=True):
            kinds = {types.get(f"{prefix}{linear}.weight") for linear in group}
            if len(kinds) != 1 or not kinds <= {ASCEND, "FLOAT", "W8A8_DYNAMIC"}:
                raise UserError(
                    f"{path}: {prefix}{group[0]} and its neighbours have the types {sorted(map(str, kinds))}; only "
                    f"{ASCEND}, W8A8_DYNAMIC and FLOAT, the same for q, k, v and for gate, up, can be converted"
                )
            if kinds != {ASCEND}:
                wide += [f"{prefix}{linear}" for linear in group]
                continue
            size = tuple(len(need(files, f"{prefix}{group[0]}.{s}_trans")) for s in ("left", "right"))
            if site == "o":
                if size[0] != heads or not _is_identity(need(files, f"{prefix}{arch.o}.right_trans")):
                    wide.append(f"{prefix}{arch.o}")
                    continue
                size = (heads,)
            if sizes.setdefault(site, size) != size:
                raise UserError(
                    f"{path}: the {site} transforms of blocks differ in size, which is not supported"
                )
    if not sizes:
        raise UserError(f"{path} has no layer of type {ASCEND}; there is nothing to convert")
    spec = make_spec("w4a4", 16, sizes, f"vllm-ascend {ASCEND}", ignore=wide)
    found = ForeignModel(
        config=config,
        side=path,
        base=base_name(raw, path),
        origin=f"Converted from a vllm-ascend {ASCEND} folder.",
        spec=spec,
        tensors=iter(()),
    )
    if wide:
        found.notes.append(
            f"{len(wide)} linear layers (such as {wide[0]}) are not 4-bit FlatQuant layers there, or have a "
            "transform that ours cannot hold; they became 16-bit layers: larger, without quantized activations"
        )

    def tensors() -> Iterator[Block]:
        clips = Clips()
        for i in range(config["num_hidden_layers"]):
            yield _ascend_block(files, f"{arch.blocks}.{i}.", arch, config, set(wide), clips)
        yield {n: files.tensor(n) for n in files.names if not n.startswith(f"{arch.blocks}.")}
        found.notes += clips.notes()

    found.tensors = tensors()
    return found


def _ascend_types(path: Path) -> dict[str, str]:
    """Tensor name -> type, from quant_model_description.json."""
    found = read_json(folder_file(path, "quant_model_description.json"))
    return {str(k): str(v) for k, v in found.items()}


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix.float(), torch.eye(len(matrix)))


def _ascend_block(
    files: WeightFiles, prefix: str, arch: Architecture, config: dict, wide: set[str], clips: Clips
) -> Block:
    out: Block = {}
    parts = ("weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = {str(d).removeprefix("torch."): d for d in FLOATS}.get(named)
    if dtype is None:
        raise UserError(
            f"{files.path}/config.json: dtype '{shown(named)}' is none of float16, bfloat16, float32; download it again"
        )
    for site, group in zip(OWNERS, arch.groups, strict=True):
        ours = f"{prefix}{OWNERS[site]}.{site}_transform"
        names = [f"{prefix}{linear}" for linear in group]
        if names[0] in wide:
            for name in names:
                out[f"{name}.weight"] = _dequantized(files, name).to(dtype)
            continue
        for side in ("left", "right"):
            factor = _shared(files, names, f"{side}_trans")
            if site == "o" and side == "right":
                continue  # the identity
            out[f"{ours}.head" if site == "o" else f"{ours}.{side}"] = factor.float()[None]
        out[f"{ours}.clip"] = clips.merge(_shared(files, names, "clip_ratio").double().tolist())
        for name in names:
            codes, scale = need(files, f"{name}.weight"), need(files, f"{name}.weight_scale")
            _check_symmetric(files, name)
            whole = codes.dtype == torch.int8 and codes.ndim == 2 and codes.numel() > 0
            if not whole or codes.shape[1] % 2 or int(codes.min()) < -8 or int(codes.max()) > 7:
                raise UserError(
                    f"{files.path}: {name}.weight holds no 4-bit integers in pairs; download it again"
                )
            out[f"{name}.weight_packed"] = pack_int4(codes)
            out[f"{name}.weight_scale"] = scale.float().reshape(-1, 1)
    taken = {f"{prefix}{linear}.{part}" for linear in arch.linears for part in parts}
    rest = [n for n in files.names if n.startswith(prefix) and n not in taken]
    return out | {n: files.tensor(n) for n in rest}


def _shared(files: WeightFiles, names: list[str], part: str) -> Tensor:
    """A tensor that linears with one input must have in common: vllm-ascend itself keeps one of them."""
    found = [need(files, f"{name}.{part}") for name in names]
    for name, other in zip(names, found, strict=True):
        if not torch.equal(other, found[0]):
            raise UserError(
                f"{files.path}: {names[0]} and {name} have different {part}, but share their input; there is no "
                "checkpoint of ours for that, quantize the original model"
            )
    return found[0]


def _check_symmetric(files: WeightFiles, name: str) -> None:
    offset = f"{name}.weight_offset"
    if offset in files and bool(files.tensor(offset).any()):
        raise UserError(f"{files.path}: {name} is asymmetric, which is not supported")


def _dequantized(files: WeightFiles, name: str) -> Tensor:
    """A linear's weight in float64, before any transform of its input: ``W' (L kron R)^T``."""
    weight = need(files, f"{name}.weight").double()
    if f"{name}.weight_scale" in files:
        offset = f"{name}.weight_offset"
        if offset in files:
            weight = weight - files.tensor(offset).double().reshape(-1, 1)
        weight = weight * files.tensor(f"{name}.weight_scale").double().reshape(-1, 1)
    if f"{name}.left_trans" in files:
        left, right = (need(files, f"{name}.{side}_trans").double() for side in ("left", "right"))
        weight = kron_wide_ref(weight, left.mT[None], right.mT[None])
    return weight
