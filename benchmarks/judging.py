"""Perplexity of a model on texts, and how flat its predictions are; and the CSV files that hold the rows."""

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_flatquant.calibration.data import evaluation_tokens
from vllm_flatquant.calibration.evaluate import windows

EVAL_BATCH = 8
TEMPERATURES = (1.05, 1.1)
"""Logits are also divided by these: a model that gains by it was too sure of itself."""
FLATNESS = ["entropy", *(f"at_{t}" for t in TEMPERATURES)]
"""Columns: mean entropy (nats) of the predicted distributions, and perplexity at each temperature."""
Wanted = tuple[str, str, list[int]]
"""A text, its file, and for how many of its first windows a row is wanted each."""


def read_tokens(model: str, file: str) -> Tensor:
    """Token ids int64 [n] of a .npy file, or of a text in the model's tokenizer."""
    source = {"tokens": file} if file.endswith(".npy") else {"text": file}
    return evaluation_tokens(Path(model), **{"text": None, "tokens": None, "dataset": None, **source})


def window_counts(
    model: str, texts: list[tuple[str, str]], seq_len: int, limit: int | None, first: int | None
) -> dict[str, list[int]]:
    """For each text, its number of windows (at most ``limit``) and, if it has more, ``first``."""
    found = {t: len(windows(read_tokens(model, f), seq_len, limit)) for t, f in texts}
    return {t: [n, *([first] if first and first < n else [])] for t, n in found.items()}


def left_of(
    texts: list[tuple[str, str]], counts: dict[str, list[int]], done: set[tuple[str, ...]], *key: str
) -> list[Wanted]:
    """The texts and numbers of windows whose row, (text, windows, *key), is not done."""
    left = [(t, f, [n for n in counts[t] if (t, str(n), *key) not in done]) for t, f in texts]
    return [wanted for wanted in left if wanted[2]]


@torch.no_grad()
def token_figures(network: Any, rows: Tensor) -> Tensor:
    """Of each token but the first of rows int64 [count, seq_len]: its loss, the entropy of the prediction, and its
    loss at each of ``TEMPERATURES``, all in nats, float64 [count, seq_len - 1, 2 + temperatures]."""
    device, found = next(network.parameters()).device, []
    for batch in rows.split(EVAL_BATCH):
        logits = network(batch.to(device), use_cache=False).logits[:, :-1].float().flatten(0, 1)
        target = batch[:, 1:].flatten().to(device)
        figures = [F.cross_entropy(logits, target, reduction="none")]
        log_p = logits.log_softmax(-1)
        figures.append(-(log_p.exp() * log_p).sum(-1))
        figures += [F.cross_entropy(logits / t, target, reduction="none") for t in TEMPERATURES]
        found.append(torch.stack(figures, -1).double().cpu().unflatten(0, (len(batch), -1)))
    return torch.cat(found)


def judge(network: Any, model: str, texts: list[Wanted], seq_len: int) -> list[dict[str, str]]:
    """A row for each text and number of windows: text, windows, perplexity and ``FLATNESS``."""
    rows = []
    for text, file, counts in texts:
        figures = token_figures(network, windows(read_tokens(model, file), seq_len, max(counts)))
        for count in counts:
            loss, entropy, *warm = figures[:count].flatten(0, 1).mean(0).tolist()
            values = [math.exp(loss), entropy, *map(math.exp, warm)]
            columns = zip(["perplexity", *FLATNESS], (f"{v:.4f}" for v in values), strict=True)
            rows.append({"text": text, "windows": str(count), **dict(columns)})
    return rows


@contextmanager
def appended(file: Path, fields: list[str]) -> Iterator[Any]:
    """Calls with rows append them to a CSV and flush; columns that an older file lacks are added, empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] | None = []
    if file.exists():
        with file.open(newline="") as old:
            reader = csv.DictReader(old)
            rows = None if reader.fieldnames == fields else list(reader)
    if rows is not None:
        new = file.with_suffix(".new")
        with new.open("w", newline="") as f:
            writer = csv.DictWriter(f, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        new.replace(file)
    with file.open("a", newline="") as f:

        def append(rows: list[dict[str, Any]]) -> None:
            csv.DictWriter(f, fields, lineterminator="\n").writerows(rows)
            f.flush()

        yield append
