"""Perplexity over non-overlapping windows, through PyTorch or through vLLM."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError


def windows(tokens: Tensor, seq_len: int, limit: int | None = None) -> Tensor:
    """int64 [n] -> [count, seq_len]: the first ``limit`` whole windows; UserError if there is none."""
    count = len(tokens) // seq_len
    if count == 0:
        raise UserError(
            f"the text has {len(tokens)} tokens, fewer than one window of {seq_len}; give more text or lower "
            "--seq-len"
        )
    count = min(count, limit) if limit else count
    return tokens[: count * seq_len].view(count, seq_len)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch_size: int = 4) -> float:
    """``exp`` of the mean next-token cross entropy over the last seq_len - 1 tokens of each row.

    model: a Transformers causal LM. rows: int64 [count, seq_len].
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(rows.max()) >= vocabulary:
        raise UserError(
            f"token id {int(rows.max())} is outside the model's vocabulary of {vocabulary}; tokenize with "
            "this model's tokenizer"
        )
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size].to(device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += (
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            .double()
            .item()
        )
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def perplexity_vllm(
    model: str | Path, rows: Tensor, dtype: str = "float32", **engine_options: object
) -> float:
    """The same figure from vLLM's prompt log-probabilities; ``dtype`` is vLLM's. Needs vLLM installed."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UserError("vLLM is not installed; use --backend reference or `pip install vllm`") from None
    seq_len = rows.shape[1]
    options: dict[str, object] = {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": seq_len + 1,
        "max_num_batched_tokens": max(2048, seq_len + 1),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    options.update(engine_options)
    llm = LLM(**options)  # type: ignore[arg-type]
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in rows.tolist()],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    total = 0.0
    for row, output in zip(rows.tolist(), outputs, strict=True):
        for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True):
            total -= entry[token].logprob
    return math.exp(total / (rows.shape[0] * (seq_len - 1)))
