"""Put a checkpoint folder together from the files of the finished stages."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..spec import FlatQuantSpec
from .head import HEAD, PACKED
from .source import SIDE_FILES, ModelSource, folder_file
from .staging import CHECKPOINT, Staging, block_stage, check_out

SHARD_BYTES = 5 * 1000**3
"""Largest shard that is packed from several files, the hub's default."""
WHOLE_BYTES = 100 * 1000**2
"""A file of this size becomes a shard as it is, so that a large checkpoint is never written twice."""
OTHERS = "others"
"""Stage that holds what is outside the blocks."""
DISTILLED = "distilled"
"""Stage after the blocks whose tensors replace those of the same name."""
ROUNDED_HEAD = "head"
"""Stage that holds an 8-bit lm_head."""
TENSORS = "tensors-*.safetensors"
"""Files of a stage that go into the checkpoint."""


def save_tensors(folder: Path, tensors: dict[str, Tensor], part: int = 0) -> None:
    """Add checkpoint tensors under their final names to a stage's folder."""
    state = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(state, folder / f"tensors-{part:05d}.safetensors", metadata={"format": "pt"})


def save_others(folder: Path, source: ModelSource) -> None:
    """Copy the tensors outside the blocks, one at a time."""
    for part, name in enumerate(source.other_names()):
        save_tensors(folder, {name: source.files.tensor(name)}, part)


def build_checkpoint(
    folder: Path, staging: Staging, blocks: int, shard_bytes: int | None = None
) -> None:
    """Shards and index of all finished stages in ``folder``.

    Files below ``WHOLE_BYTES`` are packed up to ``shard_bytes``; others are linked, which takes no space.
    """
    stages = (OTHERS, *(block_stage(i) for i in range(blocks)), DISTILLED, ROUNDED_HEAD)
    files = [f for s in stages for f in sorted((staging.folder / s).glob(TENSORS))]
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as f:
            where.update(dict.fromkeys(f.keys(), file))
    if PACKED in where:
        where.pop(HEAD, None)
    names = {file: [n for n, at in where.items() if at == file] for file in files}
    groups = pack([f for f in files if names[f]], SHARD_BYTES if shard_bytes is None else shard_bytes)
    index, total = {}, 0
    for i, group in enumerate(groups):
        shard = "model.safetensors"
        if len(groups) > 1:
            shard = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        total += _write_shard(folder / shard, {file: names[file] for file in group})
        index.update({n: shard for file in group for n in names[file]})
    # With one shard too: vLLM reads every *.safetensors file that no index excludes, the golden prompt as well.
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2
    )
    write_text(folder / "model.safetensors.index.json", text + "\n")


def pack(files: list[Path], limit: int) -> list[list[Path]]:
    """Consecutive files in groups of at most ``limit`` bytes; a file of ``WHOLE_BYTES`` or more is alone."""
    groups: list[list[Path]] = []
    room = 0
    for file in files:
        size = file.stat().st_size
        if not groups or size > room or size >= WHOLE_BYTES:
            groups.append([])
            room = limit
        groups[-1].append(file)
        room = 0 if size >= WHOLE_BYTES else room - size
    return groups


def _write_shard(shard: Path, parts: dict[Path, list[str]]) -> int:
    """Write the named tensors of ``parts`` to one file; returns their bytes."""
    state: dict[str, Tensor] = {}
    whole = len(parts) == 1
    for file, names in parts.items():
        with safe_open(file, "pt") as f:
            state.update({n: f.get_tensor(n) for n in names})
            whole = whole and len(names) == len(f.keys())
    if whole:
        link(next(iter(parts)), shard)
    else:
        save_file(state, shard, metadata={"format": "pt"})
    return sum(t.numel() * t.element_size() for t in state.values())


def link(file: Path, target: Path) -> None:
    """A second name for ``file``, or a copy where the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def write_text(file: Path, text: str) -> None:
    """A UTF-8 text file of the checkpoint."""
    file.write_text(text, encoding="utf-8")


def write_side_files(folder: Path, source: Path, config: dict[str, Any], spec: FlatQuantSpec) -> None:
    """config.json with the spec, and the source's tokenizer, generation and licence files."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(folder_file(source, file.name), folder / file.name)
    config = {**config, "quantization_config": spec.model_dump()}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_checkpoint(
    out: Path,
    overwrite: bool,
    parts: Iterable[dict[str, Tensor]],
    source: Path,
    config: dict[str, Any],
    spec: FlatQuantSpec,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """A checkpoint of finished tensors under their full names, one part in memory at a time.

    source, config: as for ``write_side_files``. finish: checks and adds to the folder before it takes its place.
    ``out`` appears when it is complete; UserError if it is taken.
    """
    check_out(out, overwrite)
    with Staging(out) as staging:
        staging.start_over(overwrite)
        with staging.stage(OTHERS) as folder:
            for i, tensors in enumerate(parts):
                save_tensors(folder, tensors, i)
        with staging.stage(CHECKPOINT) as folder:
            build_checkpoint(folder, staging, 0)
            write_side_files(folder, source, config, spec)
            finish(folder)
        return staging.publish(overwrite)
