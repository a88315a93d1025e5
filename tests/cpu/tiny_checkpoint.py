"""Tiny checkpoints in our format, made without calibration: random models, random transforms, RTN weights.

The transforms are well conditioned and folded into the weights, so the model computes about what the
unquantized one does.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_flatquant.kernels.pack import pack_codes
from vllm_flatquant.kernels.quantize import qmax, quantize_ref
from vllm_flatquant.sites import SITES, Site

HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 4, 2, 32, 192, 128


@dataclass(frozen=True)
class Recipe:
    """What to make. ``architecture`` is a Transformers prefix: Llama, Mistral, Qwen2 or Qwen3."""

    architecture: str = "Llama"
    bits: int = 4
    weight_bits: int = 4
    group_size: int | None = None
    k_bits: int = 16
    v_bits: int = 16
    shards: int = 1
    lm_head_bits: int = 16
    dtype: torch.dtype = torch.float32
    ignore: tuple[str, ...] = ("lm_head",)
    no_site: tuple[str, ...] = ()
    layers: int = 2
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def hidden(self) -> int:
        """Hidden size; unlike HEADS * HEAD_DIM, but vLLM's Qwen2 knows no head_dim of its own."""
        return HEADS * HEAD_DIM if self.architecture == "Qwen2" else 96

    def quantization_config(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""
        wide, down = {"left": 8, "right": self.hidden // 8}, INTERMEDIATE // self.shards
        sites: dict[str, Any] = {
            "qkv": wide,
            "o": HEADS // self.shards,
            "gate_up": wide,
            "down": {"left": 8, "right": down // 8},
        }
        sites |= dict.fromkeys(self.no_site) | {"k": HEAD_DIM if self.k_bits < 16 else None}
        return {
            "quant_method": "flatquant",
            "format_version": 1,
            "producer": {"name": "tests", "version": "0"},
            "weights": {"bits": self.weight_bits, "group_size": self.group_size},
            "activations": {"bits": self.bits},
            "kv": {
                "k_bits": self.k_bits,
                "v_bits": self.v_bits,
                "symmetric": 4 not in (self.k_bits, self.v_bits),
            },
            "shards": self.shards,
            "lm_head_bits": self.lm_head_bits,
            "ignore": [name for name in self.ignore if name != "lm_head" or self.lm_head_bits == 16],
            "sites": sites,
        }


def random_model(recipe: Recipe) -> Any:
    """The unquantized Transformers model, in the recipe's dtype, with random norms and biases."""
    options = {
        "hidden_size": recipe.hidden,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": recipe.layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.1,
    } | recipe.config
    config = getattr(transformers, f"{recipe.architecture}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{recipe.architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(recipe.dtype).eval()


def random_factor(shards: int, size: int) -> Tensor:
    """[shards, size, size] float32 holding bf16 values, condition number about 2."""
    rotation = torch.linalg.qr(torch.randn(shards, size, size))[0]
    stretch = 1 + 0.3 * torch.rand(shards, 1, size)
    return (rotation * stretch).bfloat16().float().contiguous()


def block_matrix(left: Tensor, right: Tensor) -> Tensor:
    """The transform as one float64 matrix [K, K]: ``z = x @ matrix``."""
    blocks = [torch.kron(a.double(), b.double()) for a, b in zip(left, right, strict=True)]
    return torch.block_diag(*blocks)


def quantize_weight(
    weight: Tensor, bits: int, group_size: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """RTN codes int8 [N, K] and scale float32 [N, groups]; scales of 16-bit models are 16-bit values."""
    groups = weight.reshape(weight.shape[0], -1, group_size or weight.shape[1])
    scale = (groups.abs().amax(-1, keepdim=True) / qmax(bits)).to(dtype).to(weight.dtype)
    codes = torch.round(groups / scale).clamp(-qmax(bits) - 1, qmax(bits)).to(torch.int8)
    return codes.reshape(weight.shape), scale.squeeze(-1).float()


def site_tensors(recipe: Recipe, site: Site, layer: nn.Module, inputs: int) -> dict[str, Tensor]:
    """Transform and quantized weights of one site of a decoder layer, by name below the layer."""
    shards = recipe.shards if site.row_parallel else 1
    parent = site.module.partition(".")[0]
    out: dict[str, Tensor] = {}
    size = recipe.quantization_config()["sites"][site.name]
    matrix = torch.eye(inputs, dtype=torch.float64)
    if site.name == "o" and size is not None:
        head = random_factor(shards, size)
        out[f"{parent}.o_transform.head"] = head
        width = inputs // shards // size
        matrix = block_matrix(head, torch.eye(width).repeat(shards, 1, 1))
    elif size is not None:
        left, right = random_factor(shards, size["left"]), random_factor(shards, size["right"])
        out[f"{parent}.{site.name}_transform.left"] = left
        out[f"{parent}.{site.name}_transform.right"] = right
        matrix = block_matrix(left, right)
    if recipe.bits < 16:
        out[f"{parent}.{site.name}_transform.clip"] = 0.9 + 0.1 * torch.rand(shards)
    for part in site.parts:
        name = f"{parent}.{part}"
        linear = layer.get_submodule(name)
        folded = linear.weight.double() @ torch.linalg.inv(matrix).T
        codes, scale = quantize_weight(folded, recipe.weight_bits, recipe.group_size, recipe.dtype)
        out[f"{name}.weight_packed"] = pack_codes(codes, recipe.weight_bits)
        out[f"{name}.weight_scale"] = scale
    return out


def kv_tensors(recipe: Recipe) -> dict[str, Tensor]:
    """K's transform and the clips of one attention layer, by name below the decoder layer."""
    out: dict[str, Tensor] = {}
    clip = {8: torch.tensor([0.95]), 4: torch.tensor([0.95, 0.9])}
    if recipe.k_bits < 16:
        matrix = random_factor(1, HEAD_DIM)[0]
        out["self_attn.k_transform.matrix"] = matrix
        out["self_attn.k_transform.inverse_t"] = torch.linalg.inv(matrix.double()).T.float().contiguous()
        out["self_attn.k_transform.clip"] = clip[recipe.k_bits].clone()
    if recipe.v_bits < 16:
        out["self_attn.v_transform.clip"] = clip[recipe.v_bits].clone()
    return out


def checkpoint_tensors(recipe: Recipe, model: Any) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, by its full name."""
    tensors = dict(model.state_dict())
    inputs = {
        "qkv": recipe.hidden,
        "o": HEADS * HEAD_DIM,
        "gate_up": recipe.hidden,
        "down": INTERMEDIATE,
    }
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        for site in SITES:
            parent = site.module.partition(".")[0]
            names = [f"{prefix}{parent}.{part}" for part in site.parts]
            if set(names) <= set(recipe.ignore):
                continue
            for name in names:
                del tensors[f"{name}.weight"]
            made = site_tensors(recipe, site, layer, inputs[site.name])
            tensors |= {prefix + name: value for name, value in made.items()}
        tensors |= {prefix + name: value for name, value in kv_tensors(recipe).items()}
    if recipe.lm_head_bits < 16:
        codes, scale = quantize_ref(tensors.pop("lm_head.weight").float(), recipe.lm_head_bits)
        tensors |= {"lm_head.weight_packed": codes, "lm_head.weight_scale": scale.unsqueeze(-1)}
    return tensors


def write_checkpoint(folder: Path, recipe: Recipe, **changes: Tensor | None) -> dict[str, Tensor]:
    """Write config.json and model.safetensors; returns the tensors.

    changes: tensors to replace, or with None to leave out, by full name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if repr(recipe) not in _MADE:
        model = random_model(recipe)
        model.config.dtype = recipe.dtype
        model.config.architectures = [type(model).__name__]
        config = model.config.to_dict() | {"quantization_config": recipe.quantization_config()}
        _MADE[repr(recipe)] = (
            checkpoint_tensors(recipe, model),
            json.dumps(config, indent=1, default=str),
        )
    made, config_text = _MADE[repr(recipe)]
    tensors = {name: value.clone() for name, value in (made | changes).items() if value is not None}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config_text, encoding="utf-8")
    return tensors


_MADE: dict[str, tuple[dict[str, Tensor], str]] = {}
