"""The two standard perplexity protocols, by name, and the plain one.

``wikitext2``: the rows of WikiText-2's raw test split joined by blank lines, one tokenizer call (so one
BOS, where the tokenizer has one, at the very start), non-overlapping windows of 2048 tokens, the rest
dropped. ``c4-new``: the first 1100 documents of C4's first validation shard joined by spaces, one
tokenizer call, the first 256 windows of 2048 (so named in the GPTQ code; its other C4 protocol draws
windows at random and gives lower figures). Both: mean cross entropy over the 2047 targets of each window,
exponentiated. ``plain``: a text as it is.
"""

import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.data import (
    check_not_empty,
    dataset_texts,
    evaluation_tokens,
    jsonl_texts,
    load_tokenizer,
    read_text,
)
from ..calibration.errors import UserError
from ..calibration.evaluate import windows

SEQ_LEN = 2048


@dataclass(frozen=True)
class Protocol:
    """How a text becomes windows. ``dataset`` (with ``split``, ``file``) is where the hub has it."""

    name: str
    dataset: str
    split: str
    file: str | None
    joiner: str
    documents: int | None
    windows: int | None


PROTOCOLS = {
    "wikitext2": Protocol(
        "wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", "test", None, "\n\n", None, None
    ),
    "c4-new": Protocol(
        "c4-new",
        "allenai/c4",
        "validation",
        "en/c4-validation.00000-of-00008.json.gz",
        " ",
        1100,
        256,
    ),
}


@dataclass(frozen=True)
class Windows:
    """Rows int64 [count, seq_len] to measure, and what to call them.

    data: the protocol, or the text's own name. change: what differs from the protocol (``windows of 512``).
    dataset, split: of the hub, None for a plain text.
    """

    rows: Tensor
    data: str
    change: str = ""
    dataset: str | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        """``wikitext2``, or ``wikitext2 (windows of 512)``."""
        return f"{self.data} ({self.change})" if self.change else self.data


def evaluation_windows(
    model: Path,
    protocol: str,
    text: str | None,
    tokens: str | None,
    dataset: str | None,
    seq_len: int | None,
    limit: int | None,
) -> Windows:
    """The windows that a protocol takes from a file or a dataset, with ``model``'s tokenizer.

    A changed seq_len or limit is part of the name. Raises UserError for a source that does not fit.
    """
    if protocol == "plain":
        ids = evaluation_tokens(model, text, tokens, dataset)
        rows = windows(ids, seq_len or SEQ_LEN, limit)
        return Windows(
            rows, Path(text or tokens or "").name or str(dataset), _change(rows, seq_len, limit)
        )
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol '{protocol}' is unknown; use plain, {' or '.join(PROTOCOLS)}")
    if tokens:
        raise UserError(
            f"protocol {protocol} tokenizes its own text; give --text or --dataset, not --tokens"
        )
    if text and dataset:
        raise UserError("give --text or --dataset, not both")
    rules = PROTOCOLS[protocol]
    documents = list(itertools.islice(_documents(rules, text, dataset), rules.documents))
    check_not_empty("".join(documents), text or dataset or rules.dataset)
    if rules.documents and len(documents) < rules.documents:
        raise UserError(
            f"protocol {protocol} takes the first {rules.documents} documents, and {text or dataset} has "
            f"{len(documents)}; give the whole shard {rules.file}"
        )
    ids = torch.tensor(
        load_tokenizer(model)(rules.joiner.join(documents), verbose=False)["input_ids"],
        dtype=torch.int64,
    )
    most = min(n for n in (rules.windows, limit, len(ids)) if n is not None)
    rows = windows(ids, seq_len or SEQ_LEN, most)
    return Windows(rows, protocol, _change(rows, seq_len, limit), rules.dataset, rules.split)


def _change(rows: Tensor, seq_len: int | None, limit: int | None) -> str:
    changes = [f"windows of {seq_len}"] if seq_len not in (None, SEQ_LEN) else []
    changes += [f"the first {len(rows)} windows"] if limit == len(rows) else []
    return ", ".join(changes)


def _documents(rules: Protocol, text: str | None, dataset: str | None) -> Iterator[str]:
    """The documents of a local file, a named dataset, or the protocol's own dataset."""
    if text is None:
        file = None if dataset else rules.file
        yield from dataset_texts(dataset or rules.dataset, rules.split, file)
        return
    path = Path(text)
    if not path.is_file():
        raise UserError(f"text file {text} does not exist; check the path")
    if path.suffix == ".parquet":
        yield from dataset_texts(str(path.parent), rules.split, path.name)
    elif path.suffix in (".json", ".jsonl", ".gz"):
        yield from _json_lines(path)
    elif rules.name == "wikitext2":
        # A row of the dataset is a line with its end, or empty.
        lines = read_text(path).split("\n")
        yield from (
            f"{line}\n" if line.strip() else "" for line in lines[: -1 if not lines[-1] else None]
        )
    else:
        raise UserError(
            f"{text}: protocol {rules.name} needs documents, which a plain text does not tell apart; give "
            "a .json, .jsonl or .json.gz file with a 'text' field per line, or a .parquet file"
        )


def _json_lines(path: Path) -> Iterator[str]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from jsonl_texts(path, lines)
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); download it again") from None
