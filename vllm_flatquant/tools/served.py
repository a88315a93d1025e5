"""A checkpoint asked through vLLM's own engine: prompt log-probabilities in float32 or 16 bits."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.errors import UserError
from ..calibration.source import load_config

engines_started = 0
"""In this process; the command line leaves differently after one."""


def prepare_engine() -> None:
    """Set what vLLM reads from the environment; call it before vLLM is imported and an engine started.

    Raises UserError if vLLM is not installed.
    """
    # vLLM logs to stdout by default, where the result belongs.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # Its warnings are about servers, and one is a traceback because no tokenizer is needed here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # GiB; by default vLLM wants most of the machine's memory, which a busy machine does not have.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # The one generated token may lie beyond the model's context: it is scored, never read.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    try:
        import vllm  # noqa: F401
    except ImportError:
        raise UserError("vLLM is not installed; use --backend reference or `pip install vllm`") from None
    print(
        "starting vLLM, which can take minutes (VLLM_LOGGING_LEVEL=INFO shows its log)", file=sys.stderr
    )
    global engines_started
    engines_started += 1


def prompt_logprobs(
    model: str | Path, rows: list[list[int]], dtype: str = "float32", top: int = 0
) -> list[list[dict[int, float]]]:
    """Log-probabilities that vLLM gives each prompt token and the ``top`` likeliest ones beside it.

    rows: token ids of each prompt, all of one length. dtype: vLLM's. Entry i of a row maps token id to
    log-probability at position i + 1; the last entry is that of the first generated token (its ``top``).
    Raises UserError if vLLM is not installed.
    """
    prepare_engine()
    from vllm import LLM, SamplingParams

    length = len(rows[0])
    batch = max(2048, length + 1)
    engine = LLM(
        model=str(model),
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=length + 1,
        max_num_batched_tokens=batch,
        max_logprobs=max(20, top),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **small_cache(Path(model), 4 * batch),
    )
    params = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=top, logprobs=top, detokenize=False
    )
    prompts: list[Any] = [{"prompt_token_ids": row} for row in rows]
    found = []
    for output in engine.generate(prompts, params, use_tqdm=False):
        entries: list[Any] = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        found.append([{token: lp.logprob for token, lp in entry.items()} for entry in entries])
    # Stopped here, not by the interpreter's exit, where vLLM's threads race with its processes.
    core: Any = engine.llm_engine.engine_core
    core.shutdown()
    return found


def small_cache(folder: Path, tokens: int) -> dict[str, Any]:
    """Options for a KV cache of ``tokens`` tokens on a GPU, which others may be using: by default vLLM wants nearly
    all of its memory, and that nobody frees any while it starts."""
    if not torch.cuda.is_available():
        return {}
    config: Any = load_config(folder)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = 2 * config.num_hidden_layers * kv_heads * head_dim * 4 * tokens  # of up to 4 bytes each
    return {
        "kv_cache_memory_bytes": size,
        "gpu_memory_utilization": 0.02,
    }  # the latter: free at the start


def token_losses_vllm(model: str | Path, rows: Tensor, dtype: str = "float32") -> Tensor:
    """``calibration.evaluate.token_losses`` of rows int64 [count, seq_len], from vLLM."""
    return torch.tensor(
        [
            [-entry[token] for token, entry in zip(row[1:], entries, strict=False)]
            for row, entries in zip(
                rows.tolist(), prompt_logprobs(model, rows.tolist(), dtype), strict=True
            )
        ],
        dtype=torch.float64,
    )
