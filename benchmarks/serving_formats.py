"""What `serving.py` compares: model shapes, and for each format how vLLM is asked for it and which kernel must run.

A model is a folder with a config.json (its quantization_config included) and a tokenizer of one token per
character: no weights, which vLLM makes up (`--load-format dummy`), and no network.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from string import printable
from typing import Any

from vllm_flatquant.calibration.factors import factor_pair
from vllm_flatquant.calibration.shards import quick_shards
from vllm_flatquant.spec import Activations, Factors, FlatQuantSpec, Producer, Sites, Weights

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Format:
    """One way to serve a model.

    kernel: what the engine's log must name, as a regular expression; "" if it must name no kernel.
    bits: of a linear weight. options: of vLLM's engine. flatquant: activation bits of our scheme.
    compressed: (weights, activations, layout) of a compressed-tensors checkpoint. env: of the engine's process.
    """

    kernel: str
    bits: float
    options: dict[str, Any] = field(default_factory=dict)
    flatquant: int | None = None
    compressed: tuple[dict[str, Any], dict[str, Any] | None, str] | None = None
    env: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether norms and SiLU*mul must run in one kernel with the transform after them."""
        return self.flatquant is not None and self.env.get("VLLM_FLATQUANT_FUSION") != "0"


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
_W4A16 = (_INT4, None, "pack-quantized")
FP8_KERNEL = r"\b(?!Marlin)\w*(?i:fp8)\w*MM\w*Kernel"

FORMATS: dict[str, Format] = {
    "bf16": Format("", 16),
    "fp8": Format(FP8_KERNEL, 8, {"quantization": "fp8_per_tensor"}),
    "fp8-channel": Format(FP8_KERNEL, 8, {"quantization": "fp8_per_channel"}),
    "w8a8-int8": Format(
        r"Cutlass\w*Int8\w*", 8, compressed=(_INT8, _TOKEN | {"type": "int"}, "int-quantized")
    ),
    "w4a16-machete": Format(r"MacheteLinearKernel", 4.13, compressed=_W4A16),
    "w4a16-marlin": Format(r"MarlinLinearKernel", 4.13, {"linear_backend": "marlin"}, compressed=_W4A16),
    "w4a8-fp8": Format(
        r"CutlassW4A8LinearKernel",
        4.13,
        compressed=(_INT4, _TOKEN | {"type": "float"}, "pack-quantized"),
    ),
    "flatquant-w4a16": Format(r"w4a16: triton backend", 4, flatquant=16),
    "flatquant-w4a8": Format(r"w4a8: triton backend", 4, flatquant=8),
    "flatquant-w4a4": Format(r"w4a4: triton backend", 4, flatquant=4),
    "flatquant-w4a4-unfused": Format(
        r"w4a4: triton backend", 4, flatquant=4, env={"VLLM_FLATQUANT_FUSION": "0"}
    ),
}


def quantization_config(form: Format, model: dict[str, Any], shards: int) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json; None where vLLM quantizes what it loads, or nothing."""
    if form.compressed is not None:
        weights, activations, layout = form.compressed
        group = {
            "targets": ["Linear"],
            "weights": {"symmetric": True, "dynamic": False, **weights},
            "input_activations": activations and {"symmetric": True, **activations},
        }
        return {
            "quant_method": "compressed-tensors",
            "format": layout,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "quantization_status": "compressed",
        }
    if form.flatquant is None:
        return None
    if form.flatquant < 16:  # as `flatquant quantize` does
        sizes = model["num_attention_heads"], model["num_key_value_heads"], model["intermediate_size"]
        shards = max(shards, quick_shards(*sizes))
    hidden, down = (
        Factors(left=left, right=right)
        for left, right in (
            factor_pair(model["hidden_size"]),
            factor_pair(model["intermediate_size"] // shards),
        )
    )
    spec = FlatQuantSpec(
        producer=Producer(name="benchmark", version="0"),
        weights=Weights(),
        activations=Activations(bits=form.flatquant),  # type: ignore[arg-type]
        shards=shards,
        sites=Sites(qkv=hidden, o=model["num_attention_heads"] // shards, gate_up=hidden, down=down),
    )
    return spec.model_dump()


def write_model(folder: Path, model: str, form: Format, shards: int = 1) -> Path:
    """Write the folder that vLLM gets as its model, and return it."""
    shape = MODELS[model]
    config = {
        "architectures": [ARCHITECTURES[shape["model_type"]]],
        "dtype": "bfloat16",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    quantization = quantization_config(form, shape, shards)
    if quantization is not None:
        config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    return folder


def weight_bytes(model: str, bits: float) -> float:
    """Bytes of the weights: linear layers in ``bits``, embedding and lm_head in bf16."""
    m = MODELS[model]
    heads = (m["num_attention_heads"] + m["num_key_value_heads"]) * 2 * m["head_dim"]
    linear = m["hidden_size"] * (heads + 3 * m["intermediate_size"]) * m["num_hidden_layers"]
    return linear * bits / 8 + 2 * m["vocab_size"] * m["hidden_size"] * 2


def kv_bytes(model: str, tokens: int) -> int:
    """Bytes of a bf16 KV cache."""
    m = MODELS[model]
    return tokens * m["num_hidden_layers"] * 2 * m["num_key_value_heads"] * m["head_dim"] * 2


def kernels_in(log: str) -> list[str]:
    """The kernels that vLLM's log names for linear layers, and what our plugin says of itself."""
    found = re.findall(r"(?:Using|Selected) (\w+Kernel\w*) for", log)
    found += re.findall(r"FlatQuant (w4a\d+: \w+ backend)", log)
    found += re.findall(r"FlatQuant w4a16 uses vLLM's (\w+)", log)
    return list(dict.fromkeys(found + fusion_lines(log)))


def fusion_lines(log: str) -> list[str]:
    """What our compile pass says that it did, a line for each range of token counts."""
    return list(dict.fromkeys(re.findall(r"FlatQuant fusion, \d[^\n]*:[^\n]* fused [^\n]*", log)))


def from_cache(log: str) -> bool:
    """Whether vLLM took its graphs from the compile cache: then our pass did not run and says nothing."""
    return "Directly load " in log or "as in the compile cache" in log


def compiled_anew(log: str) -> bool:
    """Whether vLLM compiled its graphs though there may have been a compile cache."""
    return "torch.compile took" in log and not from_cache(log)


def ran_as(name: str, log: str) -> tuple[str, str]:
    """(format, kernels) for the results: the format's own name only if its kernels ran."""
    form, kernels = FORMATS[name], kernels_in(log)
    lines = fusion_lines(log)
    if form.fused and not lines:
        kernels.append("nothing fused")
    text = "; ".join(kernels)
    right = bool(re.search(form.kernel, text)) if form.kernel else not kernels
    fused = bool(lines) and all(
        re.search(r": [1-9]\d* RMSNorm and [1-9]\d* SiLU\*mul fused ", line) for line in lines
    )
    # Any fusion at all would be wrong for a format that names none.
    right = right and (fused if form.fused else not lines)
    return (name if right else f"{name} (ran as {text or 'no quantized kernel'})"), text


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<s>", "</s>", "<unk>", *printable[:95]]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"unk_token": "<unk>"}))
