"""A look at a checkpoint's files before the engine starts: what is missing or damaged is named at once.

Names, transforms and per-channel scales are checked here; the loader checks every tensor as it comes.
"""

import json
from pathlib import Path

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
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); {_AGAIN}") from None
        files = sorted({folder / name for name in listed.values()})
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


def check_files(folder: Path, spec: FlatQuantSpec, blocks: int) -> None:
    """Raise CheckpointError naming a tensor of ``blocks`` decoder blocks that ``folder`` lacks, or that
    has the wrong shape, NaN or inf.
    """
    files = tensor_files(folder)
    needed: dict[str, tuple[int, ...] | None] = {}
    for i in range(blocks):
        needed |= block_tensors(spec, f"model.layers.{i}")
    found = set().union(*files.values())
    missing = [name for name in needed if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks {missing[0]}{more}; {_AGAIN}")
    for file, names in files.items():
        with safe_open(file, "pt") as tensors:
            for name in sorted(names & needed.keys()):
                shape, small = (
                    needed[name],
                    name.endswith("weight_scale") and spec.weights.group_size is None,
                )
                if shape is None and not small:
                    continue
                tensor = tensors.get_tensor(name)
                if shape is not None and tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        f"{name} has shape {list(tensor.shape)} but quantization_config says {list(shape)}; "
                        f"{_AGAIN}"
                    )
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{name} contains NaN or inf; {_AGAIN}")
