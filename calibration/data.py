"""Tokens for calibration and evaluation, from files, the standard library's source or a dataset."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..files import first_line
from .errors import UserError
from .hub import check_hub

# Tests are not library code; encodings and pydoc_data are tables that drown everything else.
STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
}


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; UserError if it has none that loads."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # else it may ask
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; each means the same here
        raise UserError(
            f"{path} has no usable tokenizer ({first_line(error)}); add its tokenizer files or pass token ids as .npy"
        ) from None


def calibration_tokens(calib: str, model: Path, samples: int, seq_len: int, seed: int) -> Tensor:
    """Calibration rows, int64 [samples, seq_len].

    calib: FILE.npy (token ids [rows, length], taken from the top, or [n]), FILE.txt, FILE.jsonl (a
    ``text`` field per line), ``stdlib`` (the running Python's own source) or the name of a Hugging Face
    dataset. Text is cut into windows drawn without overlap by ``seed``.
    """
    if calib.endswith(".npy"):
        ids = read_npy(Path(calib))
        if ids.ndim == 2:
            if ids.shape[0] < samples or ids.shape[1] < seq_len:
                raise UserError(
                    f"{calib} holds {ids.shape[0]} rows of {ids.shape[1]} tokens, but {samples} rows of "
                    f"{seq_len} are asked for; lower --samples or --seq-len"
                )
            return ids[:samples, :seq_len].contiguous()
        return draw_windows(ids, samples, seq_len, seed, calib)
    tokenizer = load_tokenizer(model)
    # Enough text is enough: stop reading at eight times what is drawn.
    need, ids_list, have = 8 * samples * seq_len, [], 0
    for text in iterate_texts(calib):
        ids_list.append(
            torch.tensor(
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
            )
        )
        have += len(ids_list[-1])
        if have >= need:
            break
    ids = torch.cat(ids_list) if ids_list else torch.zeros(0, dtype=torch.int64)
    return draw_windows(ids, samples, seq_len, seed, calib)


def check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    """UserError if a token id of ``tokens`` is not below ``vocabulary``."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"token ids run from {low} to {high}, outside the model's vocabulary of {vocabulary}; tokenize with "
            "this model's tokenizer"
        )


def draw_windows(ids: Tensor, samples: int, seq_len: int, seed: int, name: str) -> Tensor:
    """``samples`` distinct, aligned windows of ``seq_len`` tokens out of ids [n], drawn by ``seed``."""
    count = len(ids) // seq_len
    if count < samples:
        raise UserError(
            f"{name} gives {len(ids)} tokens, but {samples} samples of {seq_len} need {samples * seq_len}; "
            "give more text, or lower --samples or --seq-len"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return ids[: count * seq_len].view(count, seq_len)[order].contiguous()


def iterate_texts(calib: str) -> Iterator[str]:
    """The documents of a text source; UserError if it cannot be read."""
    path = Path(calib)
    if calib == "stdlib":
        yield from stdlib_texts()
    elif path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise UserError(f"calibration file {calib} does not exist; check the path")
        text = read_text(path)
        yield from [text] if path.suffix == ".txt" else jsonl_texts(path, text.split("\n"))
    elif path.suffix or path.exists():
        raise UserError(
            f"calibration source '{calib}' is not understood; give a .txt, .jsonl or .npy file, 'stdlib' or a "
            "Hugging Face dataset name"
        )
    else:
        yield from dataset_texts(calib)


def read_text(path: Path) -> str:
    """A UTF-8 file; UserError if it is something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({error}); convert it or check the path"
        ) from None


def check_not_empty(text: str, name: str) -> None:
    """UserError if ``text`` is blank, whatever tokens a tokenizer adds to it. name: of its file or dataset."""
    if not text.strip():
        raise UserError(f"{name} is empty; give a text to measure on")


def jsonl_texts(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The ``text`` field of each line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError("text is no string")
                yield text
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path} line {number} is no JSON object with a 'text' field; fix the line"
                ) from None


def stdlib_texts() -> Iterator[str]:
    """The standard library's source files in a fixed order, without its tests and the held-out files."""
    sources = stdlib_sources(Path(sysconfig.get_path("stdlib")))
    yield from (text for name, text in sources.items() if not is_held_out(name))


def stdlib_sources(root: Path) -> dict[str, str]:
    """Path below ``root`` -> text, of every library module that decodes as UTF-8, in a fixed order."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_SKIPPED.intersection(relative.parts):
            continue
        try:
            sources[relative.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return sources


def is_held_out(name: str) -> bool:
    """Whether a standard library file is one of the twentieth that nothing is trained or calibrated on.

    name: its path below the library's root. ``examples/heldout.txt`` holds such files.
    """
    return hashlib.sha256(name.encode()).digest()[0] < 13


def dataset_texts(name: str, split: str = "train", files: str | None = None) -> Iterator[str]:
    """The ``text`` column of a Hugging Face dataset's split, streamed.

    name: ``name``, ``name:config`` or a folder. files: the one file of the repository that is the split.
    """
    if not Path(name).is_dir():
        check_hub()
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"text source '{name}' is no file; to use a Hugging Face dataset install "
            "`pip install 'vllm-flatquant[datasets]'`"
        ) from None
    repo, _, config = name.partition(":")
    given: Any = {"data_files": {split: files}} if files else {}
    try:
        for row in load_dataset(repo, config or None, split=split, streaming=True, **given):
            yield row["text"]
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; each means the same here
        raise UserError(
            f"dataset '{name}' cannot be read ({first_line(error)}); check the name and the network"
        ) from None


def read_npy(path: Path) -> Tensor:
    """Token ids of a .npy file as int64, [n] or [rows, length]; UserError if it is something else."""
    if not path.is_file():
        raise UserError(f"token file {path} does not exist; check the path")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        why = (
            error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or of objects"
        )
        raise UserError(f"{path} is no .npy file of numbers ({why}); save it with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise UserError(
            f"{path} holds {getattr(array, 'dtype', 'an archive')} of shape {getattr(array, 'shape', '?')}; token ids are integers of shape [n] or [rows, n]"
        )
    return torch.from_numpy(array.astype(np.int64))


def evaluation_tokens(model: Path, text: str | None, tokens: str | None, dataset: str | None) -> Tensor:
    """Token ids int64 [n] to evaluate on, from exactly one of the three sources."""
    given = [s for s in (text, tokens, dataset) if s]
    if len(given) != 1:
        raise UserError("give exactly one of --text, --tokens and --dataset")
    if tokens:
        return read_npy(Path(tokens)).flatten()
    if text:
        path = Path(text)
        if not path.is_file():
            raise UserError(f"text file {text} does not exist; check the path")
        if path.suffix == ".npy":
            raise UserError(f"{text} holds token ids; give it to --tokens")
        if path.suffix in (".jsonl", ".parquet", ".gz"):  # else its braces and keys would be measured
            raise UserError(
                f"{text} holds documents, and without a protocol a text is measured as it is; give --protocol, or "
                "join them in a .txt file"
            )
        body = read_text(path)
    if dataset:
        body = "\n\n".join(dataset_texts(str(dataset)))
    check_not_empty(body, str(text or dataset))
    tokenizer = load_tokenizer(model)
    return torch.tensor(tokenizer(body, verbose=False)["input_ids"], dtype=torch.int64)
