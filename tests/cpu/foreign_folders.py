"""Small folders in the layouts of other FlatQuant tools, written from their descriptions, not with our code.

The weights are those of a random model of ``tiny_model``; each maker returns the tensors that it wrote.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

QKV = [f"self_attn.{p}_proj" for p in "qkv"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
GROUPS = {"qkv": QKV, "o": ["self_attn.o_proj"], "gate_up": GATE_UP, "down": ["mlp.down_proj"]}
LINEARS = [linear for linears in GROUPS.values() for linear in linears]
HEADS, HEAD_DIM, BLOCKS = 6, 16, 2
SIZES = {"qkv": (6, 8), "gate_up": (6, 8), "down": (8, 11)}
OFFICIAL = {
    "qkv": "self_attn.ln_trans",
    "o": "self_attn.o_trans",
    "gate_up": "mlp.up_gate_trans",
    "down": "mlp.down_trans",
}


def invertible(n: int) -> torch.Tensor:
    """A well-conditioned matrix that is no rotation, float32."""
    return (torch.linalg.qr(torch.randn(n, n))[0] * (0.7 + 0.6 * torch.rand(n))).contiguous()


def int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -8..7 and scale [out, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    return (weight / scale).round().clamp(-8, 7).to(torch.int8), scale


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two's complement, low nibble = even column."""
    return ((codes[:, ::2] & 15) | ((codes[:, 1::2] & 15) << 4)).to(torch.uint8)


def flat_matrices(file: Path, kv: bool = True, equal_clips: bool = False) -> dict:
    """What the official ``save_flat_matrices`` stores: block -> name -> tensor; clips before the sigmoid."""
    torch.manual_seed(2)
    blocks = {}
    for i in range(BLOCKS):
        block = {}
        for site, name in OFFICIAL.items():
            if site == "o":
                block[f"{name}.matrix"] = invertible(HEADS)
                continue
            for side, n in zip(("left", "right"), SIZES[site], strict=True):
                block[f"{name}.matrix_{side}"] = invertible(n)
            block[f"{name}.diag_scale"] = 0.5 + torch.rand(SIZES[site][0] * SIZES[site][1])
        block["self_attn.vcache_trans.matrix"] = invertible(HEAD_DIM)
        if kv:
            block["self_attn.kcache_trans.matrix"] = invertible(HEAD_DIM)
            for which in ("k", "v"):
                for end in ("max", "min"):
                    block[f"self_attn.{which}_cache_quantizer.clip_factor_a_{end}"] = 3 + torch.rand(1)
        for linears in GROUPS.values():
            for linear in linears:
                for end in ("max", "min"):
                    value = torch.full((1,), 3.0) if equal_clips else 2 + 2 * torch.rand(1)
                    block[f"{linear}.act_quantizer.clip_factor_a_{end}"] = value
        blocks[i] = block
    torch.save(blocks, file)
    return blocks


def add_weight_clips(blocks: dict, model: Path, file: Path) -> None:
    """Add the learned weight clips, one pair of logits for each row."""
    tensors = load_file(model / "model.safetensors")
    for i, block in blocks.items():
        for linear in LINEARS:
            rows = len(tensors[f"model.layers.{i}.{linear}.weight"])
            for end in ("max", "min"):
                block[f"{linear}.clip_factor_w_{end}"] = 1 + 2 * torch.rand(rows, 1)
    torch.save(blocks, file)


def start(model: Path, folder: Path, **config) -> dict[str, torch.Tensor]:
    """Copy the model's folder without its weights; returns those. config: changes of config.json."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    torch.manual_seed(3)
    return load_file(model / "model.safetensors")


def realquant(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A folder of the official ``--quantized_save``."""
    tensors = start(
        model, folder, quantization_config={"fuseLN": False, "trans": "matmul", "online_trans": []}
    )
    out = {n: t.half() for n, t in tensors.items() if "_proj" not in n}
    for i in range(BLOCKS):
        p = f"model.layers.{i}."
        for site, name in OFFICIAL.items():
            if site == "o":
                out[f"{p}{name}.matrix"] = invertible(HEADS).half()
                out[f"{p}{name}.matrix_inv_t"] = torch.zeros(HEADS, HEADS).half()  # not to be used
                continue
            for side, n in zip(("left", "right"), SIZES[site], strict=True):
                out[f"{p}{name}.matrix_{side}"] = invertible(n).half()
                out[f"{p}{name}.matrix_{side}_inv"] = torch.zeros(n, n).half()
            out[f"{p}{name}.diag_scale"] = torch.full((SIZES[site][0] * SIZES[site][1],), 9.0).half()
        matrix = invertible(HEAD_DIM)
        out[f"{p}self_attn.kcache_trans.matrix"] = matrix.half()
        out[f"{p}self_attn.kcache_trans.matrix_inv_t"] = torch.linalg.inv(matrix).T.contiguous().half()
        out[f"{p}self_attn.vcache_trans.matrix"] = torch.zeros(HEAD_DIM, HEAD_DIM).half()
        for which in ("k", "v"):
            for end in ("max", "min"):
                name = f"{p}self_attn.{which}_cache_quantizer.clip_factor_a_{end}"
                out[name] = (3 + torch.rand(1)).half()
        for linear in LINEARS:
            codes, scale = int4(tensors[f"{p}{linear}.weight"].float())
            out[f"{p}{linear}.linear.weight"] = nibbles(codes)
            quantizer = f"quantizer.{p}{linear}.linear"
            out[f"{quantizer}.scale"] = scale
            out[f"{quantizer}.zero"] = torch.zeros_like(scale)
            out[f"{quantizer}.maxq"] = torch.tensor(7)
            for end in ("max", "min"):
                out[f"{p}{linear}.act_quantizer.clip_factor_a_{end}"] = (2 + 2 * torch.rand(1)).half()
                out[f"{p}{linear}.clip_factor_w_{end}"] = torch.ones(len(scale), 1).half()
    save_file(out, folder / "model.safetensors", metadata={"quantization_config": "{}"})
    (folder / "quantization_config.json").write_text(json.dumps({"w_bits": 4, "format": "packed_int4"}))
    return out


def squeezebits(model: Path, folder: Path, repeated: bool = True) -> dict[str, torch.Tensor]:
    """A W4A16 folder; groups of 8 stand for their 128."""
    quantization = {
        "quant_method": "flatquant",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 8, "symmetric": True}}},
        "ignore": ["lm_head"],
    }
    tensors = start(model, folder, quantization_config=quantization)
    out = {n: t for n, t in tensors.items() if "_proj" not in n}
    for i in range(BLOCKS):
        p = f"model.layers.{i}."
        for site, module in (("qkv", "qkv"), ("gate_up", "gate_up"), ("down", "down")):
            parent = "self_attn" if site == "qkv" else "mlp"
            for side, n in zip(("left", "right"), SIZES[site], strict=True):
                out[f"{p}{parent}.{module}_proj.flatquant_{side}"] = invertible(n).bfloat16()
        out[f"{p}self_attn.o_proj.flatquant_left"] = invertible(HEADS).bfloat16()
        for linear in LINEARS:
            codes, scale = int4(tensors[f"{p}{linear}.weight"].float())
            biased = (codes.int() + 8).unflatten(1, (-1, 8))
            packed = sum(biased[..., j].long() << (4 * j) for j in range(8))
            packed = torch.where(packed >= 2**31, packed - 2**32, packed)
            out[f"{p}{linear}.weight_packed"] = packed.int()
            out[f"{p}{linear}.weight_shape"] = torch.tensor(codes.shape)
            groups = scale.repeat(1, codes.shape[1] // 8)
            if not repeated:
                groups = groups * (0.5 + torch.rand_like(groups))
            out[f"{p}{linear}.weight_scale"] = groups.bfloat16()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    return out


def ascend(model: Path, folder: Path, wide: tuple[str, ...] = ("o", "down")) -> dict[str, torch.Tensor]:
    """A W4A4_FLATQUANT_DYNAMIC folder. wide: sites whose layers are W8A8_DYNAMIC."""
    tensors = start(model, folder)
    out = {n: t for n, t in tensors.items() if "_proj" not in n}
    types = dict.fromkeys(out, "FLOAT")
    sizes = SIZES | {"o": (HEADS, HEAD_DIM)}
    for i in range(BLOCKS):
        p = f"model.layers.{i}."
        for site, linears in GROUPS.items():
            left, right = (invertible(n).bfloat16() for n in sizes[site])
            clip = 0.8 + 0.2 * torch.rand(1)
            for linear in linears:
                weight, name = tensors[f"{p}{linear}.weight"].float(), p + linear
                if site in wide:
                    scale = weight.abs().amax(1, keepdim=True) / 127
                    offset = torch.randint(-3, 3, scale.shape).float()
                    made = {"weight": (weight / scale + offset).round().clamp(-128, 127).to(torch.int8)}
                    made |= {"weight_scale": scale, "weight_offset": offset}
                    kind = "W8A8_DYNAMIC"
                else:
                    codes, scale = int4(weight)
                    made = {"weight": codes, "weight_scale": scale}
                    made |= {"weight_offset": torch.zeros_like(scale), "clip_ratio": clip.clone()}
                    made |= {"left_trans": left.clone(), "right_trans": right.clone()}
                    kind = "W4A4_FLATQUANT_DYNAMIC"
                out |= {f"{name}.{part}": t for part, t in made.items()}
                types |= {f"{name}.{part}": kind for part in made}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    types["model_quant_type"] = "W4A4_FLATQUANT_DYNAMIC"
    (folder / "quant_model_description.json").write_text(json.dumps(types))
    return out
