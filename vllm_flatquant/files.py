"""A look at a checkpoint's files before the engine starts: what is missing or cut off is named at once.

Only names and file headers are read; the loader checks shapes and values.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .sites import block_tensors
from .spec import FlatQuantSpec

_AGAIN = "download it again or quantize the model again"


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's safetensors files, which must be readable.

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
    names: set[str] = set()
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {_AGAIN}")
        try:
            with safe_open(file, "pt") as tensors:
                names |= set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); {_AGAIN}") from None
    return names


def check_files(folder: Path, spec: FlatQuantSpec, blocks: int) -> None:
    """Raise CheckpointError naming the tensors of ``blocks`` decoder blocks that ``folder`` lacks."""
    found = tensor_names(folder)
    needed = [name for i in range(blocks) for name in block_tensors(spec, f"model.layers.{i}")]
    missing = [name for name in needed if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks {missing[0]}{more}; {_AGAIN}")
