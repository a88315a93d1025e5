"""A look at a checkpoint's files before the engine starts: what is missing or damaged is named at once.

Names and shapes are checked here, and that scales, transforms and norms are finite; the loader checks
every tensor again as it comes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .sites import block_tensors
from .spec import FlatQuantSpec

_AGAIN = "download it again or quantize the model again"


def tensor_files(folder: Path) -> dict[str, set[str]]:
    """The safetensors files of a folder with the names of their tensors.

    Raises CheckpointError for a file that is missing, cut off or not safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = {
                str(n) for n in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); {_AGAIN}") from None
        if any(Path(name).name != name for name in listed):
            raise CheckpointError(f"{index} points outside its folder; {_AGAIN}")
        files = sorted(folder / name for name in listed)
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files; {_AGAIN}")
    found: dict[str, set[str]] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {_AGAIN}")
        try:
            with safe_open(file, "pt") as tensors:
                found[str(file)] = set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); {_AGAIN}") from None
    return found


def check_files(folder: Path, spec: FlatQuantSpec, hf_config: Any) -> None:
    """Raise CheckpointError naming a tensor of a decoder block that ``folder`` lacks, or that has the
    wrong shape, NaN or inf.

    hf_config: the model's Transformers config. A config without the usual sizes is not checked.
    """
    try:
        sizes = linear_sizes(hf_config)
        blocks, hidden = int(hf_config.num_hidden_layers), int(hf_config.hidden_size)
    except (AttributeError, TypeError):
        return
    needed: dict[str, tuple[int, ...] | None] = {}
    for i in range(blocks):
        needed |= block_tensors(spec, f"model.layers.{i}", sizes)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            needed[f"model.layers.{i}.{norm}.weight"] = (hidden,)
    needed |= {
        "model.embed_tokens.weight": (hf_config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    files = tensor_files(folder)
    found = set().union(*files.values())
    missing = [name for name in needed if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks {missing[0]}{more}; {_AGAIN}")
    for file, names in files.items():
        with safe_open(file, "pt") as tensors:
            for name in sorted(names & needed.keys()):
                shape, given = needed[name], tuple(tensors.get_slice(name).get_shape())
                if shape is not None and given != shape:
                    raise CheckpointError(
                        f"{name} has shape {list(given)} but config.json says {list(shape)}; {_AGAIN}"
                    )
                # The packed weights hold integers, and reading them all would cost a second load.
                if name.endswith("weight_packed"):
                    continue
                values = tensors.get_tensor(name)
                if not bool(torch.isfinite(values).all()):
                    raise CheckpointError(f"{name} contains NaN or inf; {_AGAIN}")
                if name.endswith(("weight_scale", ".clip")) and not bool((values > 0).all()):
                    raise CheckpointError(f"{name} contains a value that is not positive; {_AGAIN}")


def linear_sizes(hf_config: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear part of a decoder block. Raises AttributeError if a size is absent."""
    hidden, intermediate = hf_config.hidden_size, hf_config.intermediate_size
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    head_dim = getattr(hf_config, "head_dim", None) or hidden // heads
    return {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
