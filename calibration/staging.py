"""The folder beside a run's output: each finished stage appears in it by one rename, so none is ever half there.

``.NAME.partial`` holds ``run.json`` (what is being done, to what), ``lock``, and a folder for each finished stage:
``inputs``, ``block-00000``, ``block-00001``, ..., and at the end ``checkpoint``, which becomes the output. A
stage that is being worked on has the suffix ``.tmp``. Whoever opens the folder holds its lock; of several processes
of one run (parallel.py) the first does, for all.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from typing_extensions import Self

from . import parallel
from .errors import UserError

INPUTS, CHECKPOINT = "inputs", "checkpoint"
_RUN, _LOCK, _PUBLISHED, _OLD, _TMP = "run.json", "lock", "published", "old", ".tmp"
_TRIES = 100
"""After so many, nothing can be made there (/proc and automounts say "no such file" for that) and no run is leaving."""


def check_out(out: Path, overwrite: bool, *sources: Path) -> None:
    """UserError unless ``out`` is free, empty, or a checkpoint that may be overwritten, holds none of ``sources``, nor
    where the user is or lives, and can be renamed. A source that is not there may be a name on the hub."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to --out")
    there = (source for source in sources if source.exists())
    held = next((source for source in there if source.resolve().is_relative_to(out)), None)
    if not out.name or held is not None:
        raise UserError(
            f"--out {out} is or holds {held or 'everything'}, which is read; choose another folder"
        )
    for folder, named in ((".", "the working directory"), (os.path.expanduser("~"), "the home folder")):
        with suppress(OSError):  # a working directory that somebody removed
            if Path(folder).resolve().is_relative_to(out):
                raise UserError(
                    f"--out {out} is or holds {named}, which would be replaced; choose another folder"
                )
    if out.is_mount():
        raise UserError(
            f"--out {out} is a mount point, whose place no finished folder can take; choose a folder in it, such as "
            f"{out / 'checkpoint'}"
        )
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty; choose another folder or pass --overwrite")
        if not _is_checkpoint(out):
            raise UserError(
                f"{out} holds something else than a FlatQuant checkpoint, which is not replaced; choose another folder"
            )


def _is_checkpoint(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "flatquant")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def staging_folder(out: Path) -> Path:
    """Where a run to ``out`` keeps its finished stages."""
    return out.with_name(f".{out.name}.partial")


def block_stage(index: int) -> str:
    """Name of a block's stage."""
    return f"block-{index:05d}"


def read_run(out: Path) -> str | None:
    """run.json of the interrupted run to ``out``, None if there is none."""
    file = staging_folder(out) / _RUN
    return file.read_text(encoding="utf-8") if file.is_file() else None


def finished_blocks(out: Path) -> int:
    """How many blocks of a run to ``out`` are finished, counted from the first."""
    folder, count = staging_folder(out), 0
    while (folder / _RUN).exists() and (folder / block_stage(count)).is_dir():
        count += 1
    return count


class Staging:
    """A locked staging folder, as a context manager. ``out`` is resolved (links followed) by the caller.

    Leaving it removes the folder unless a block is finished. Raises UserError if another run holds it.
    """

    def __init__(self, out: Path):
        self.out, self.folder = out, staging_folder(out)
        self._lock, self._removed = -1, False

    def __enter__(self) -> Self:
        if not parallel.is_writer():
            return self
        tries = 0
        while self._lock < 0:
            tries += 1
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if any(self.folder.iterdir()) and not (self.folder / _LOCK).exists():
                    raise UserError(
                        f"{self.folder} is in the way and holds no interrupted run; move it or choose another --out"
                    )
                self._lock = self._take_lock()
            except OSError as error:
                if isinstance(error, FileNotFoundError) and tries < _TRIES:
                    continue  # the run before removed it between two of these lines
                raise UserError(
                    f"{self.out} cannot be made ({error.strerror}); choose another --out"
                ) from None
        for leftover in self.folder.glob(f"*{_TMP}"):
            remove(leftover)
        if (self.folder / _OLD).exists() and not self.out.exists():
            (self.folder / _OLD).rename(self.out)  # stopped between the two renames of ``publish``
        return self

    def _take_lock(self) -> int:
        """The lock's file descriptor, or -1 if the file was replaced meanwhile."""
        file = self.folder / _LOCK
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"another run is writing {self.out} now; wait for it or choose another --out"
            ) from None
        except FileNotFoundError:
            pass
        os.close(lock)
        return -1

    def __exit__(self, *_: object) -> None:
        if not parallel.is_writer():
            return
        if not self._removed and not self.finished_blocks():
            self.remove()
        os.close(self._lock)

    def remove(self) -> None:
        """Remove everything, the folder too."""
        self._empty()
        (self.folder / _LOCK).unlink(missing_ok=True)
        self._removed = True
        with suppress(OSError):  # another run may be there already
            self.folder.rmdir()

    def _empty(self) -> None:
        """Remove all but the lock; run.json first, because without it the rest is no interrupted run."""
        (self.folder / _RUN).unlink(missing_ok=True)
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                remove(entry)

    def refuse_finished(self, overwrite: bool) -> None:
        """UserError if a new run would lose finished blocks and ``overwrite`` is not given."""
        done = self.finished_blocks()
        if done and not overwrite:
            raise UserError(
                f"an interrupted run to {self.out} has {done} finished blocks; pass --resume to go on with it or "
                "--overwrite to start again"
            )

    def start_over(self, overwrite: bool) -> None:
        """Remove what an earlier run left, unless ``refuse_finished``."""
        self.refuse_finished(overwrite)
        self._empty()

    def write_run(self, text: str) -> None:
        """Replace run.json in one step."""
        temporary = self.folder / f"{_RUN}{_TMP}"
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.rename(self.folder / _RUN)

    def has(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return (self.folder / stage).is_dir()

    def finished_blocks(self) -> int:
        """How many blocks are finished, counted from the first."""
        return finished_blocks(self.out)

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """An empty folder to fill. It takes its place when the ``with`` block ends, and goes if that fails."""
        work, done = self.folder / f"{name}{_TMP}", self.folder / name
        remove(done)
        work.mkdir()
        try:
            yield work
            for file in work.iterdir():
                sync(file)
            sync(work)
            work.rename(done)
            sync(self.folder)
        except BaseException:
            remove(work)
            raise

    @contextmanager
    def shared_stage(self, name: str) -> Iterator[Path]:
        """As ``stage``, for a folder that every process fills: the first makes and commits it."""
        if parallel.is_writer():
            with self.stage(name) as work:
                parallel.wait()
                yield work
                parallel.wait()
        else:
            parallel.wait()
            yield self.folder / f"{name}{_TMP}"
            parallel.wait()
        parallel.wait()  # it has its name now

    def publish(self, overwrite: bool) -> Path:
        """Move the finished checkpoint to ``out`` and remove the staging folder."""
        check_out(self.out, overwrite)  # something may have appeared there meanwhile
        (self.folder / _PUBLISHED).touch()
        mode = (
            (self.folder / _PUBLISHED).stat().st_mode
        )  # safetensors writes files that only the owner may read
        for file in (self.folder / CHECKPOINT).iterdir():
            file.chmod(mode)
        if self.out.exists():
            remove(self.folder / _OLD)
            self.out.rename(self.folder / _OLD)
        (self.folder / CHECKPOINT).rename(self.out)
        self.remove()
        return self.out

    def is_published(self) -> bool:
        """Whether ``publish`` was stopped after its last rename: nothing is left to do but to remove."""
        return (self.folder / _PUBLISHED).exists() and not self.has(CHECKPOINT)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


_FIXES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space or have the quota raised",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f, or the file system's)",
    errno.EACCES: "change who may use it",
    errno.EPERM: "change who may use it",
    errno.EROFS: "make it writable",
}
"""Number of a file system's error -> what to do about it. There are many others, with many causes."""


@contextmanager
def explained(out: Path, staging: Staging) -> Iterator[None]:
    """Errors of the file system as one sentence, with what to do; every error says which blocks are kept."""
    try:
        yield
    except (OSError, SafetensorError, UserError) as error:
        done = staging.finished_blocks()
        kept = f"; finished blocks are kept for --resume: {done}" if done else ""
        if isinstance(error, UserError):
            raise type(error)(str(error) if "--resume" in str(error) else f"{error}{kept}") from None
        file, why, number = _told(error)
        fix = _FIXES.get(number, "remove the cause and try again")  # type: ignore[arg-type]
        if file is not None and not any(file.is_relative_to(x) for x in (out, staging.folder)):
            raise UserError(f"{file} cannot be used ({why}); {fix}{kept}") from error
        fix += "" if done else " or choose another --out"
        raise UserError(f"{out} cannot be written ({why}); {fix}{kept}") from error


def _told(error: OSError | SafetensorError) -> tuple[Path | None, str, int | None]:
    """The file that an error is about if it says so, the reason, its number."""
    if isinstance(error, OSError):
        about = error.filename if error.filename2 is None else None  # a copy names what it reads first
        return Path(about) if isinstance(about, str) else None, error.strerror or str(error), error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None, str(error).rpartition("I/O error: ")[2], int(number[1]) if number else None
