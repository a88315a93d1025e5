"""Write a checkpoint folder: everything goes to a folder beside it that takes its place only when complete."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

from ..spec import FlatQuantSpec
from .errors import UserError
from .source import SIDE_FILES, folder_file

SHARD_BYTES = 5 * 1000**3
"""Largest shard, the hub's default."""


def check_out(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """UserError unless ``out`` is free, empty, or may be overwritten, and does not hold ``source``."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to --out")
    if not out.name or (source is not None and source.resolve().is_relative_to(out)):
        raise UserError(f"--out {out} is or holds the model that is read; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder or pass --overwrite")


class CheckpointWriter:
    """Collects tensors into shards in a hidden folder beside ``out``; ``finish`` moves it to ``out``.

    Use as a context manager: leaving it without ``finish`` removes what was written, and nothing else.
    ``out`` is resolved (symbolic links followed) by the caller.
    """

    def __init__(self, out: Path, overwrite: bool, shard_bytes: int = SHARD_BYTES):
        check_out(out, overwrite)
        self.out, self.overwrite, self.shard_bytes = out, overwrite, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0
        self._sealed = False

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        except OSError as error:
            raise UserError(
                f"{self.out} cannot be made ({error.strerror}); choose another --out"
            ) from None
        self.folder.chmod(0o755)  # mkdtemp makes it readable by the owner alone
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add tensors under their final names."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._bytes + size > self.shard_bytes:
                self._flush()
            self._pending[name] = tensor.detach().cpu().contiguous().clone()
            self._bytes += size

    def _flush(self) -> None:
        if self._pending:
            save_file(
                self._pending, self.folder / f"shard-{len(self._shards)}", metadata={"format": "pt"}
            )
            self._shards.append(list(self._pending))
            self._total += self._bytes
            self._pending, self._bytes = {}, 0

    def write_text(self, name: str, text: str) -> None:
        """A text file of the checkpoint."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_side_files(self, source: Path, config: dict[str, Any], spec: FlatQuantSpec) -> None:
        """config.json with the spec, and the source's tokenizer, generation and licence files."""
        for pattern in SIDE_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(folder_file(source, file.name), self.folder / file.name)
        config = {**config, "quantization_config": spec.model_dump()}
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")

    def seal(self) -> Path:
        """Name the shards and write the index: the folder (returned), not yet in place, can then be read."""
        if self._sealed:
            return self.folder
        self._sealed = True
        self._flush()
        count = len(self._shards)
        where = {}
        for i, names in enumerate(self._shards):
            final = (
                "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            )
            (self.folder / f"shard-{i}").rename(self.folder / final)
            where.update({name: final for name in names})
        # With one shard too: vLLM reads every *.safetensors file that no index excludes, the golden prompt as well.
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        self.write_text("model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        return self.folder

    def finish(self) -> Path:
        """Put the finished folder in place."""
        self.seal()
        check_out(self.out, self.overwrite)  # another run may have finished there meanwhile
        old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        if self.out.exists():
            self.out.rename(old / "old")
        self.folder.rename(self.out)
        shutil.rmtree(old)
        return self.out
