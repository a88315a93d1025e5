"""Small random unquantized models of every supported architecture, as folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden / heads
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def make_model(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **sizes
) -> Path:
    """Save a random model with biases, norms and weights that are not at their initial values."""
    settings = {**SIZES, **sizes}
    if model_type == "qwen2":  # its head_dim is always hidden / heads
        settings.pop("head_dim")
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.5 * torch.rand_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def random_tokens(rows: int, length: int, vocabulary: int = SIZES["vocab_size"]) -> torch.Tensor:
    """int64 [rows, length], always the same."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def edit_config(model: Path, **changes) -> None:
    """Change keys of a model folder's config.json."""
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(model: Path, change) -> None:
    """Let ``change`` edit the dict of a folder's tensors."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
