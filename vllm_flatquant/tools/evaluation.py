"""``flatquant eval``: perplexity on the reference backend, through vLLM, or both, and of the original."""

import gc
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from torch import Tensor

from ..calibration.card import add_results, check_card, load_card
from ..calibration.errors import UserError
from ..calibration.evaluate import token_losses
from ..calibration.quantize import choose_device
from ..calibration.reference import load_reference, read_spec
from ..calibration.source import check_context, load_config, resolve_folder
from .protocols import Windows, evaluation_windows
from .served import token_losses_vllm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("reference", "vllm", "both")
SAME_IN_ORIGINAL = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
"""What two models differ in that were not made from each other; token ids of one mean nothing to another."""


def evaluate(
    model: str,
    text: str | None = None,
    tokens: str | None = None,
    dataset: str | None = None,
    seq_len: int | None = None,
    limit: int | None = None,
    backend: str = "reference",
    dtype: str | None = None,
    device: str = "auto",
    protocol: str = "plain",
    original: str | None = None,
    update_card: bool = False,
) -> dict[str, Any]:
    """Perplexity of a checkpoint or an unquantized model, and of ``original`` beside it.

    dtype: of the mathematics outside the integer products [``default_dtype``]. original: the unquantized
    model; with ``update_card`` the one that the card names, if not given.
    Returns perplexity, tokens (predicted), windows, seq_len, data (the protocol or the text), backend,
    dtype and model; with both backends served_perplexity, difference (served / reference - 1) and
    token_difference (mean absolute difference of a token's log-probability, in nats) too; with an
    original original_perplexity. Raises UserError for bad input.
    """
    check_options(backend, dtype, limit)
    dtype = dtype or default_dtype(backend)
    if seq_len is not None and seq_len < 2:
        raise UserError(f"seq_len={seq_len} leaves nothing to predict; use 2 or more")
    path = resolve_folder(model)
    beside = original_folder(path, original, update_card)
    found = evaluation_windows(path, protocol, text, tokens, dataset, seq_len, limit)
    rows = found.rows
    for folder in (path, beside):
        if folder:
            check_context(load_config(folder), rows.shape[1])
    first = "vllm" if backend == "vllm" else "reference"
    losses = measure(path, rows, first, dtype, device)
    result: dict[str, Any] = {
        "perplexity": perplexity_of(losses),
        "tokens": losses.numel(),
        "windows": rows.shape[0],
        "seq_len": rows.shape[1],
        "data": found.name,
        "backend": backend,
        "dtype": dtype,
        "model": str(model),
    }
    if backend == "both":
        served = measure(path, rows, "vllm", dtype, device)
        result["served_perplexity"] = perplexity_of(served)
        result["difference"] = result["served_perplexity"] / result["perplexity"] - 1
        result["token_difference"] = (served - losses).abs().mean().item()
    if beside:
        result["original_perplexity"] = perplexity_of(measure(beside, rows, first, dtype, device))
    if update_card:
        add_results(path, [card_result(result, found)])
    return result


def default_dtype(backend: str) -> str:
    """float32, except where vLLM serves on a GPU: our kernels there have 16-bit types only."""
    return "bfloat16" if backend != "reference" and torch.cuda.is_available() else "float32"


def check_options(backend: str, dtype: str | None, limit: int | None) -> None:
    """UserError for a backend, dtype or limit that does not exist."""
    if backend not in BACKENDS:
        raise UserError(f"backend '{backend}' is unknown; use one of {', '.join(BACKENDS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves nothing to measure; use 1 or more")


def measure(path: Path, rows: Tensor, backend: str, dtype: str, device: str) -> Tensor:
    """Cross entropy of each token but the first of rows [count, seq_len], float64 [count, seq_len - 1]."""
    if backend == "reference":
        losses = token_losses(load_reference(path, choose_device(device), DTYPES[dtype]), rows)
        free_gpu()
        return losses
    check_served(path, dtype)
    return token_losses_vllm(path, rows, dtype)


def free_gpu() -> None:
    """Give a model's memory back to the GPU: vLLM asks for most of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_served(path: Path, dtype: str) -> None:
    """UserError if vLLM cannot serve the folder in that dtype on this machine."""
    if read_spec(path) is not None and dtype == "float32" and torch.cuda.is_available():
        raise UserError("FlatQuant's GPU kernels have no float32; use --dtype bfloat16 with vLLM")


def perplexity_of(losses: Tensor) -> float:
    """``exp`` of the mean."""
    return math.exp(losses.mean())


def original_folder(path: Path, original: str | None, update_card: bool) -> Path | None:
    """Where the unquantized model to measure beside ``path`` is, None if none is wanted.

    With ``update_card`` it is the one that the card names, if not given. Raises UserError, also if it is quantized
    or the card could not be written.
    """
    if update_card:
        if read_spec(path) is None:
            raise UserError(
                f"{path} is not quantized, and --update-card writes into a checkpoint's README.md; leave it out, or "
                "give a checkpoint"
            )
        check_card(path)
        original = original or card_original(path)
    return unquantized(original, path) if original else None


def unquantized(original: str, path: Path) -> Path:
    """The folder of the original model of checkpoint ``path``; UserError if what it holds is quantized, or another
    model."""
    folder = resolve_folder(original)
    if read_spec(folder) is not None:
        raise UserError(
            f"--original {original} is a FlatQuant checkpoint; give the unquantized model that it was made from"
        )
    ours, theirs = load_config(path), load_config(folder)
    for name in SAME_IN_ORIGINAL:
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"--original {original} has {name}={getattr(theirs, name)} and {path} {getattr(ours, name)}; give the "
                "model that it was made from"
            )
    return folder


def card_original(path: Path) -> str:
    """The base model that the folder's card names; UserError if this machine cannot know where it is."""
    named = getattr(load_card(path).data, "base_model", None)
    if isinstance(named, str) and (Path(named).is_dir() or "/" in named):
        return named
    raise UserError(
        f"{path}: its card calls the original '{named}', which is no folder here; say where it is with --original"
    )


def card_result(result: dict[str, Any], found: Windows) -> EvalResult:
    """One perplexity as the hub's metadata holds it."""
    name, _, config = (found.dataset or found.data).partition(":")
    return EvalResult(
        task_type="text-generation",
        dataset_type=name,
        dataset_name=found.data,
        dataset_config=config or None,
        dataset_split=found.split,
        metric_type="perplexity",
        metric_name=f"perplexity ({found.change})" if found.change else "perplexity",
        metric_value=round(result["perplexity"], 4),
        metric_args={
            "windows": result["windows"],
            "seq_len": result["seq_len"],
            "backend": "vllm" if result["backend"] == "vllm" else "reference",
            "dtype": result["dtype"],
            "unquantized": round(result["original_perplexity"], 4),
        },
    )


def result_lines(result: dict[str, Any]) -> list[str]:
    """What to print of ``evaluate``'s result."""
    backend = "reference" if result["backend"] == "both" else result["backend"]
    lines = [
        (
            f"perplexity {result['perplexity']:.4f} on {result['data']}: {result['windows']} x {result['seq_len']} tokens "
            f"({backend}, {result['dtype']})"
        )
    ]
    if "served_perplexity" in result:
        lines.append(
            f"served     {result['served_perplexity']:.4f} through vLLM: {100 * result['difference']:+.3f}%, a token's "
            f"log-probability differs by {result['token_difference']:.2e} nat in the mean"
        )
    if "original_perplexity" in result:
        ratio = result["perplexity"] / result["original_perplexity"] - 1
        lines.append(
            f"original   {result['original_perplexity']:.4f} unquantized: the checkpoint's is {100 * ratio:+.2f}%"
        )
    return lines
