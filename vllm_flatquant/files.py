"""A checkpoint's files, before anything is built from them: what is missing, unknown, damaged or outside
the folder is named at once.

Names, types and shapes are checked here, and that scales, transforms, norms and biases are finite; the
loader checks every tensor again as it comes.
"""

import copy
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, UnsupportedError, shown
from .sites import check_head_dim, checkpoint_shapes
from .spec import FlatQuantSpec, SpecError, foreign_message, foreign_tool

INDEX = "model.safetensors.index.json"
AGAIN = "download it again or quantize the model again"

LARGEST_SIZES = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 22,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 28,
}
"""Sizes of config.json beyond which it is damaged: building a model from them would take all memory."""

_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header gives it: its file, shape, and dtype in safetensors' words."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def file_inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a model's folder, which need not exist.

    Raises CheckpointError if it lies elsewhere, by its name or through a link. The files of a snapshot in
    the Hugging Face cache, links to the blobs beside it, belong to their folder.
    """
    file = folder / name
    try:
        home, target = folder.resolve(), file.resolve()
        homes = [home]
        if home.parent.name == "snapshots":
            homes.append((home.parent.parent / "blobs").resolve())
        inside = Path(name).name == name and any(target.is_relative_to(h) for h in homes)
        file.exists()  # raises for names that no file can have
    except PermissionError:
        raise CheckpointError(
            f"{file} cannot be read (Permission denied); correct its permissions"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: '{shown(name)}' is no usable file name ({type(error).__name__}); {AGAIN}"
        ) from None
    if not inside:
        raise CheckpointError(
            f"{folder}: '{shown(name)}' points outside its folder; copy the file there, or {AGAIN}"
        )
    return file


def weight_files(folder: Path, skip: Collection[str] = ()) -> list[Path]:
    """The safetensors files that an index lists, or without an index all of the folder's but ``skip``.

    Raises CheckpointError for an index that is damaged or lists a file outside the folder or one that is
    not there; returns an empty list if there are none and no index.
    """
    index = file_inside(folder, INDEX)
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [file_inside(folder, name) for name in listed]
        except CheckpointError as error:
            raise CheckpointError(f"{INDEX} of {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is damaged ({type(error).__name__}); {AGAIN}") from None
        if not files:
            raise CheckpointError(f"{index} is damaged (it lists nothing); {AGAIN}")
    else:
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        files = [file_inside(folder, name) for name in found if name not in skip]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {shown(file.name)}, which its index lists; {AGAIN}")
    return files


def stored_tensors(folder: Path, skip: Collection[str] = ()) -> dict[str, StoredTensor]:
    """Every tensor of ``weight_files``, from the headers alone.

    Raises CheckpointError also if there is no such file, or one cannot be read.
    """
    files = weight_files(folder, skip)
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files; {AGAIN}")
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    header = tensors.get_slice(name)
                    found[name] = StoredTensor(file, tuple(header.get_shape()), str(header.get_dtype()))
        except (SafetensorError, OSError) as error:
            if not os.access(file, os.R_OK):  # the library says that there is no such file
                raise CheckpointError(
                    f"{file} cannot be read (Permission denied); correct its permissions"
                ) from None
            raise CheckpointError(f"{file} cannot be read ({first_line(error)}); {AGAIN}") from None
    return found


def check_not_foreign(folder: Path, hf_config: Any) -> None:
    """Raise SpecError if a folder, which vLLM takes for unquantized, is that of another FlatQuant tool."""
    found: list[Any] = [getattr(hf_config, "quantization_config", None)]
    for name in ("quantization_config.json", "quant_model_description.json"):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            continue
    for config in found:
        tool = foreign_tool(config) if isinstance(config, Mapping) else None
        if tool is not None:
            raise SpecError(foreign_message(str(folder), tool))


def first_line(error: Exception) -> str:
    """What ``error`` says, cut to what fits into a sentence: its first line, and all that follows one that ends in
    a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return shown(" ".join(lines) if lines[0].endswith(":") else lines[0], 200)


def check_sizes(config: Mapping[str, Any], required: Collection[str] = ()) -> None:
    """Raise CheckpointError if a size of a model config is no number from 1 to ``LARGEST_SIZES``, or a required
    one is not there (others may be: Transformers has defaults for them)."""
    for key, largest in LARGEST_SIZES.items():
        value = config.get(key)
        if value is None and key not in required:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise CheckpointError(
                f"config.json: {key} is {shown(value, 40)}, not a number from 1 to {largest}; {AGAIN}"
            )


def check_tensors(
    folder: Path, found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError naming the first tensor that is missing, unknown, misshapen or mistyped.

    Not in ``expected`` and harmless: the rotary tables of old models, and a tied head's own copy.
    """
    missing = [name for name in expected if name not in found]
    unknown = sorted(
        name
        for name in found.keys() - expected.keys()
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    )
    for kind, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{folder} {kind} tensor {shown(names[0], 200)}{more}; {AGAIN}")
    for name, shape in expected.items():
        stored = found[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(stored.shape)} but config.json says {list(shape)}; {AGAIN}"
            )
        if stored.dtype not in _legal_types(name):
            raise CheckpointError(
                f"{folder}: {name} is {stored.dtype} but must be {' or '.join(_legal_types(name))}; {AGAIN}"
            )


def _legal_types(name: str) -> tuple[str, ...]:
    if name.endswith(".weight_packed"):
        return ("U8", "I8")
    if name.endswith(".weight_scale") or "_transform." in name:
        return ("F32",)
    return _FLOATS


def model_shapes(hf_config: Any) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of each tensor of the unquantized model, built without memory.

    hf_config: its Transformers config. None if Transformers cannot build a model from it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            # Building changes the config, and this one is vLLM's.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), trust_remote_code=False)
    except Exception:  # noqa: BLE001 - vLLM names what is wrong with such a config, or knows the model
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def head_size(hf_config: Any) -> int:
    """head_dim of a Transformers config; hidden_size over heads if it has none."""
    given = getattr(hf_config, "head_dim", None)
    return int(given or hf_config.hidden_size // hf_config.num_attention_heads)


def check_servable(hf_config: Any) -> None:
    """Raise UnsupportedError for a model of a supported family that vLLM's class of that family refuses, or runs
    without a part of it. hf_config: its Transformers config."""
    family = hf_config.model_type
    activation = getattr(hf_config, "hidden_act", "silu")
    if activation != "silu":
        why = f"hidden_act '{shown(activation, 40)}', and vLLM has this family with silu only"
    elif family == "qwen3" and getattr(hf_config, "attention_bias", False):
        why = "attention_bias, and vLLM's Qwen3 leaves out o_proj's bias"
    elif family in ("qwen2", "qwen3") and len(set(getattr(hf_config, "layer_types", None) or ())) > 1:
        why = "sliding windows in some layers, and vLLM has this family with one kind of attention only"
    else:
        return
    raise UnsupportedError(
        f"config.json: the model has {why}; FlatQuant cannot serve it, use another model"
    )


def check_files(folder: Path, spec: FlatQuantSpec, hf_config: Any) -> None:
    """Raise CheckpointError naming a tensor that ``folder`` lacks, that does not belong there, or that has
    the wrong shape or type, NaN or inf; UnsupportedError if ``ignore`` names a part of a fused layer.

    hf_config: the model's Transformers config. Of a model that Transformers cannot build only the files
    are checked.
    """
    check_sizes(hf_config.to_dict())
    found = stored_tensors(folder)
    shapes = model_shapes(hf_config)
    if shapes is None:
        return
    check_head_dim(spec, head_size(hf_config))
    if getattr(hf_config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    check_tensors(folder, found, checkpoint_shapes(spec, shapes))
    for file in sorted({stored.file for stored in found.values()}):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                # The packed weights hold integers, and reading them all would cost a second load.
                if name.endswith("weight_packed"):
                    continue
                values = tensors.get_tensor(name)
                if not bool(torch.isfinite(values).all()):
                    raise CheckpointError(f"{folder}: {name} contains NaN or inf; {AGAIN}")
                if name.endswith(("weight_scale", ".clip")) and not bool((values > 0).all()):
                    raise CheckpointError(
                        f"{folder}: {name} contains a value that is not positive; {AGAIN}"
                    )
