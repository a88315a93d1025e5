"""What the parts of a calibration step take on a GPU that have more than one form: attention and fake quantization.

    python benchmarks/training_parts.py

Milliseconds forward, and forward and backward together (medians); peak memory of the latter beyond the inputs. Attention: float32
with grouped heads, causal, products in TF32; ``plain`` keeps [heads, tokens, tokens], ``divided`` is PyTorch's fused kernel as it
comes, ``undivided`` the same with gradients that repeat, ``ours`` what training runs (``calibration/attention.py``). Fake
quantization: of activations to 4 bits, ``plain`` in PyTorch, ``ours`` as kernels (``kernels/fake_quantize.py``). Rows go to
benchmarks/results/training_parts.csv; what is there for this GPU, PyTorch and commit is not measured again.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import RESULTS, Table, environment, need_gpu
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from vllm_flatquant.calibration.attention import FusedAttention, attention_forward
from vllm_flatquant.kernels.fake_quantize import (
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_backward_ref,
    fake_quantize_ref,
)

COLUMNS = [
    "part",
    "size",
    "form",
    "forward_ms",
    "both_ms",
    "peak_gb",
    "gpu",
    "torch",
    "triton",
    "commit",
]
KEY = ["part", "size", "form", "gpu", "torch", "commit"]
ATTENTION = [(8, 6, 2, 1024, 64), (4, 32, 8, 2048, 128), (4, 64, 8, 2048, 128)]
"""Rows, query heads, key heads, tokens, width: a step of llama-12m's last stage, of a block of 8B and of 70B."""
ACTIVATIONS = [(8192, 4096), (8192, 14336)]
"""Tokens, channels."""

Forms = dict[str, tuple[Callable[[], object], Callable[[], object]]]
"""Form -> forward, and forward and backward."""


def attention_forms(
    rows: int, heads: int, key_heads: int, tokens: int, width: int, device: str = "cuda"
) -> Forms:
    """The ways to compute attention of these sizes and its gradients."""
    groups = heads // key_heads
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    inputs = [
        torch.randn(rows, h, tokens, width, device=device, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    ]
    gradient = torch.randn(rows, tokens, heads, width, device=device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa_attention_forward(module, q, k, v, None)[0]

    def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        alone = SimpleNamespace(is_causal=True)
        return sdpa_attention_forward(alone, q, repeat_kv(k, groups), repeat_kv(v, groups), None)[0]

    def undivided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = FusedAttention.apply(q, repeat_kv(k, groups), repeat_kv(v, groups), True, None)
        return out.transpose(1, 2).contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(module, q, k, v, None)[0]

    def pair(way: Callable[..., Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
        detached = [x.detach() for x in inputs]
        return lambda: way(*detached), lambda: torch.autograd.grad(way(*inputs), inputs, gradient)

    ways = (plain, divided, undivided, ours)
    return {way.__name__: pair(way) for way in ways}


def fake_quantize_forms(tokens: int, channels: int, device: str = "cuda") -> Forms:
    """The ways to round activations and back, and their gradients."""
    z, gradient = (torch.randn(tokens, 1, channels, device=device) for _ in range(2))
    clip = torch.tensor([0.9], device=device)

    def pair(
        forward: Callable[..., object], backward: Callable[..., object]
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        return (
            lambda: forward(z, 4, clip),
            lambda: (forward(z, 4, clip), backward(gradient, z, 4, clip)),
        )

    return {
        "plain": pair(fake_quantize_ref, fake_quantize_backward_ref),
        "ours": pair(fake_quantize, fake_quantize_backward),
    }


def peak_gb(call: Callable[[], object]) -> float:
    """GB that a call has at most beyond what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def sizes() -> Iterator[tuple[str, str, Callable[[], Forms]]]:
    """Part, its size in words, and what makes its forms."""
    for shape in ATTENTION:
        rows, heads, key_heads, tokens, width = shape
        text = f"{rows} x {heads} / {key_heads} x {tokens} x {width}"
        yield "attention", text, functools.partial(attention_forms, *shape)
    for tokens, channels in ACTIVATIONS:
        yield (
            "fake quantization",
            f"{tokens} x {channels}",
            functools.partial(fake_quantize_forms, tokens, channels),
        )


def main() -> None:
    """Measure what is not there, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "training_parts.csv")
    args = parser.parse_args()
    need_gpu()
    from triton.testing import do_bench

    torch.set_float32_matmul_precision("high")
    table, common = Table(args.results, COLUMNS, KEY), environment()
    for part, size, make in sizes():
        for form, (forward, both) in make().items():
            row = {"part": part, "size": size, "form": form, **common}
            if table.has(row):
                continue
            with torch.no_grad():
                forward_ms = do_bench(forward, return_mode="median")
            both_ms = do_bench(both, return_mode="median")
            figures = {"forward_ms": f"{forward_ms:.3f}", "both_ms": f"{both_ms:.3f}"}
            row |= figures | {"peak_gb": f"{peak_gb(both):.2f}"}
            table.append(row)
            print(
                f"{part} {size}, {form}: {forward_ms:.2f} ms, with backward {both_ms:.2f} ms, {row['peak_gb']} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
