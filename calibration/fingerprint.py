"""What a run depends on: recipe, model files, calibration tokens, device and versions, and what changed in them."""

import hashlib
import json
import platform
import struct
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from .. import __version__
from ..sites import block_tensors
from ..spec import FlatQuantSpec
from .errors import UserError
from .recipe import Recipe
from .source import is_finite
from .staging import block_stage, read_run, staging_folder

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 1 << 25
"""Bytes read at a time."""


class FileState(BaseModel):
    """A weight file: size in bytes and time of change in ns (a file where both are as before is not read
    again), and the SHA-256 of its content."""

    size: int
    changed: int
    sha256: str


class Run(BaseModel):
    """One run of ``flatquant quantize``: run.json of its staging folder.

    model, calib: as given, paths made absolute. config, tokens: digests of config.json and of the calibration
    tokens. environment: what can change the last bits of the result. processes: of torchrun, which decide how the
    stored streams are ordered.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    calib: str
    device: str
    overwrite: bool
    recipe: Recipe
    weights: dict[str, FileState]
    config: str
    tokens: str
    environment: dict[str, str]
    processes: int = 1


def interrupted_run(out: Path) -> Run:
    """What the interrupted run to ``out`` was; UserError if there is none, or run.json is damaged or of
    another version."""
    text = read_run(out)
    if text is None:
        finished = (out / "config.json").is_file()
        fix = "what it holds is finished" if finished else "leave out --resume to start one"
        raise UserError(f"there is no interrupted run to {out}; {fix}")
    try:
        return Run.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{staging_folder(out)}/run.json cannot be used ({'.'.join(map(str, first['loc']))}: {first['msg']}); "
            "it is damaged or of another version, so pass --overwrite without --resume to start again"
        ) from None


def environment(device: torch.device) -> dict[str, str]:
    """Versions, device and threads: with all of them equal, the same inputs give the same bits."""
    found = {
        "vllm-flatquant": __version__,
        "vllm-flatquant's source": source_digest(),
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def source_digest() -> str:
    """Digest of the code that makes the numbers."""
    here = Path(__file__).resolve().parent
    files = sorted([*here.glob("*.py"), *(here.parent / "kernels").glob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def text_digest(config: dict) -> str:
    """Digest of a JSON object, whatever its layout."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def token_digest(tokens: Tensor) -> str:
    """Digest of token ids, int64 [N, T]."""
    shape = str(tuple(tokens.shape)).encode()
    return hashlib.sha256(shape + tokens.contiguous().numpy().tobytes()).hexdigest()


def scan_weights(
    files: list[Path], known: dict[str, FileState], on_progress: Callable[[float], None]
) -> dict[str, FileState]:
    """Read every weight file once; its state by name. UserError at the first tensor with NaN or inf.

    known: states of an earlier scan. on_progress receives the finished fraction.
    """
    total = sum(file.stat().st_size for file in files) or 1
    done, states = 0, {}
    for file in files:
        stat = file.stat()
        before = known.get(file.name)
        if before and (before.size, before.changed) == (stat.st_size, stat.st_mtime_ns):
            states[file.name] = before
        else:
            start = done
            digest = _scan_file(file, lambda read, start=start: on_progress((start + read) / total))  # type: ignore[misc]
            states[file.name] = FileState(size=stat.st_size, changed=stat.st_mtime_ns, sha256=digest)
        done += stat.st_size
        on_progress(done / total)
    return states


def _scan_file(file: Path, on_read: Callable[[int], None]) -> str:
    """SHA-256 of a safetensors file whose header was found valid; UserError if a value is not finite."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with file.open("rb") as f:
        size = f.read(8)
        header = f.read(struct.unpack("<Q", size)[0])
        digest.update(size + header)
        entries = {n: e for n, e in json.loads(header).items() if n != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                view = memoryview(buffer)[: min(CHUNK, left)]
                if f.readinto(view) != len(view):
                    raise UserError(f"{file} is cut off; download it again")
                digest.update(view)
                left -= len(view)
                if entry["dtype"] in _DTYPES and not is_finite(
                    torch.frombuffer(view, dtype=_DTYPES[entry["dtype"]])
                ):
                    raise UserError(
                        f"{file}: tensor {name} holds NaN or inf; the model is damaged, download it again"
                    )
                on_read(f.tell())
    return digest.hexdigest()


def check_recipe(out: Path, old: Recipe, new: Recipe) -> None:
    """UserError that names a setting in which the interrupted run to ``out`` had another value."""
    was, now = old.model_dump(), new.model_dump()
    for name in now:
        if now[name] != was[name]:
            raise UserError(
                _cannot_go_on(out, f"the recipe's {name} is {now[name]} and was {was[name]}")
            )


def check_same(out: Path, old: Run, new: Run) -> None:
    """UserError that names what makes ``new`` another run than the interrupted run ``old`` to ``out``."""
    check_recipe(out, old.recipe, new.recipe)
    changed = None
    for name in sorted(old.weights.keys() | new.weights.keys()):
        if name not in new.weights:
            changed = f"the model's {name} is gone"
        elif name not in old.weights or old.weights[name].sha256 != new.weights[name].sha256:
            changed = f"the model's {name} has changed"
    if old.config != new.config:
        changed = "the model's config.json has changed"
    elif old.tokens != new.tokens:
        changed = f"the calibration tokens of {new.calib} have changed"
    elif old.device != new.device:
        changed = f"the device is {new.device} and was {old.device}"
    elif old.processes != new.processes:
        changed = (
            f"it had {old.processes} processes (torchrun --nproc-per-node) and now has {new.processes}"
        )
    if changed:
        raise UserError(_cannot_go_on(out, changed))


def check_transforms(out: Path, spec: FlatQuantSpec, block: str) -> None:
    """UserError if the finished blocks of the interrupted run to ``out`` have transforms of other sizes than ``spec``,
    as the version that made them chose others. block: name of the first."""
    wanted = block_tensors(spec, block)
    for file in sorted((staging_folder(out) / block_stage(0)).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            was = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        for name in sorted(was.keys() & wanted.keys()):
            if wanted[name] not in (None, was[name]):
                changed = f"vllm-flatquant has changed, and {name} is {wanted[name]} and was {was[name]}"
                raise UserError(_cannot_go_on(out, changed))


def _cannot_go_on(out: Path, changed: str) -> str:
    return (
        f"the interrupted run to {out} cannot go on: {changed}; undo that, or pass --overwrite without --resume "
        "to start again"
    )


def other_bits(old: Run, new: Run) -> str | None:
    """What differs in the environment, in words: the result can then differ in its last bits."""
    differ = [
        f"{name} {new.environment.get(name)} (was {old.environment.get(name)})"
        for name in sorted(old.environment.keys() | new.environment.keys())
        if old.environment.get(name) != new.environment.get(name)
    ]
    return ", ".join(differ) or None
