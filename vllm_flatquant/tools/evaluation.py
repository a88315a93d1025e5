"""``flatquant eval``."""

from typing import Any

import torch

from ..calibration.data import evaluation_tokens
from ..calibration.errors import UserError
from ..calibration.evaluate import perplexity, windows
from ..calibration.quantize import choose_device
from ..calibration.reference import load_reference, read_spec
from ..calibration.source import load_config, resolve_folder
from .served import perplexity_vllm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def evaluate(
    model: str,
    text: str | None,
    tokens: str | None,
    dataset: str | None,
    seq_len: int,
    limit: int | None,
    backend: str = "reference",
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity of a checkpoint or an unquantized model.

    Returns perplexity, tokens (predicted), windows, seq_len, backend, dtype and model.
    Raises UserError for bad input.
    """
    if backend not in ("reference", "vllm"):
        raise UserError(f"backend '{backend}' is unknown; use reference or vllm")
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} leaves nothing to predict; use 2 or more")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no window; use 1 or more")
    path = resolve_folder(model)
    rows = windows(evaluation_tokens(path, text, tokens, dataset), seq_len, limit)
    context = getattr(load_config(path), "max_position_embeddings", seq_len)
    if seq_len > context:
        raise UserError(
            f"seq_len={seq_len} is beyond the model's context of {context} tokens; use --seq-len {context}"
        )
    if backend == "reference":
        value = perplexity(load_reference(path, choose_device(device), DTYPES[dtype]), rows)
    else:
        read_spec(path)
        value = perplexity_vllm(path, rows, dtype)
    return {
        "perplexity": value,
        "tokens": rows.shape[0] * (seq_len - 1),
        "windows": rows.shape[0],
        "seq_len": seq_len,
        "backend": backend,
        "dtype": dtype,
        "model": str(model),
    }
