"""``flatquant inspect``: what a checkpoint holds, and whether it still computes what it computed when made."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..calibration.errors import UserError
from ..calibration.reference import load_reference, quantized_spec, read_spec
from ..calibration.source import (
    GOLDEN,
    WeightFiles,
    check_weights,
    folder_file,
    load_config,
    resolve_folder,
)
from ..choice import choose_backend, cuda_capability, kernel_name, suitable_scheme
from ..files import first_line
from ..sites import SITE_NAMES
from ..spec import FlatQuantSpec
from .served import prompt_logprobs


class Tolerance(NamedTuple):
    """How far a replay may be off.

    median: largest difference of the top logits at the median position of the prompt. Where two machines sum
    in another order, one activation can round to the other side, and the positions after it differ by more;
    damage shows at every position. margin: where the recorded best logit leads by more than this, the replayed
    best token must be the same.
    """

    median: float
    margin: float


FLOAT32 = Tolerance(0.05, 1.0)
FIRST, EXACT = 4, 1e-3
"""So many first positions, this close, are what an undamaged checkpoint gives before a code moves."""
BFLOAT16 = {16: Tolerance(0.2, 1.0), 8: Tolerance(0.3, 1.0), 4: Tolerance(1.7, 4.0)}
"""By bits of activations, for vLLM on a GPU: rounding to bf16 moves codes, and 4-bit codes move far. On the
example model the medians are 0.05, 0.09 and 1.2 (largest margin of a changed token 0.12, 0.18 and 3.0 of 25,600
positions); a transform or a weight whose columns are reversed in one of five blocks gives 1.3 or more, 1.9 with
4 bits. The reference backend, in float32, sees smaller damage."""


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""Any of these is enough; a model calibrated on token ids may have none."""
NO_TOKENIZER = (
    "tokenizer   none here: `vllm serve` needs --tokenizer MODEL, or copy its tokenizer files here"
)


def describe_folder(folder: str) -> dict[str, Any]:
    """What a checkpoint holds and what this machine would do with it, after checking that every tensor is
    there. Sizes are in bytes. Raises UserError."""
    path = resolve_folder(folder)
    spec = quantized_spec(path)
    config = load_config(path)
    files = WeightFiles(path)
    check_weights(path, config, files, spec)
    capability = cuda_capability()
    backend, scheme = choose_backend(capability), suitable_scheme(capability)
    sizes = tensor_sizes(files)
    quantized = {k: v for k, v in sizes.items() if k != "other"}
    return {
        "folder": str(path),
        "model_type": config.model_type,
        "blocks": config.num_hidden_layers,
        "tensors": len(files.names),
        "tokenizer": any((path / name).is_file() for name in TOKENIZERS),
        "bytes": sizes,
        "bits_per_weight": spec.weights.bits * sum(quantized.values()) / max(1, sizes["weights"]),
        "scheme": spec.scheme,
        "spec": spec.model_dump(),
        "errors": [
            {k: report.get(k) for k in ("block", "error_before", "error_after")}
            | {"trained": bool(report.get("epoch_losses"))}
            for report in calibration_log(path)
        ],
        "end_to_end": next(
            (
                {k: report.get(k) for k in ("kl_held_out_before", "kl_held_out_after", "undone")}
                for report in log_lines(path)
                if "kl_last_epoch" in report
            ),
            None,
        ),
        "here": {
            "capability": capability,
            "backend": backend.name,
            "reason": backend.reason,
            "kernel": kernel_name(spec.weights.bits, spec.activations.bits, capability),
            "suitable_scheme": scheme.name,
            "suitable_reason": scheme.reason,
        },
    }


def tensor_sizes(files: WeightFiles) -> dict[str, int]:
    """Bytes of each kind of tensor, from the headers alone; ``other``: all that is outside the linears of
    the blocks."""
    sizes = dict.fromkeys(("weights", "scales", "transforms", "other"), 0)
    for name, tensor in files.stored.items():
        kind = "other"
        if name.startswith("lm_head."):
            kind = "other"
        elif name.endswith("weight_packed"):
            kind = "weights"
        elif name.endswith("weight_scale"):
            kind = "scales"
        elif "_transform." in name:
            kind = "transforms"
        sizes[kind] += prod(tensor.shape) * int(tensor.dtype.lstrip("BFUI")) // 8
    return sizes


def calibration_log(path: Path) -> list[dict[str, Any]]:
    """``log_lines`` of the blocks, one for each."""
    return [line for line in log_lines(path) if line.get("block") is not None]


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a checkpoint's calibration_log.jsonl; [] if there is none. Raises UserError if it is damaged."""
    file = folder_file(path, "calibration_log.jsonl")
    if not file.is_file():
        return []
    try:
        lines = [
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no object")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}); copy it again") from None
    return lines


def inspect_folder(folder: str) -> str:
    """``describe_folder`` for people. Raises UserError."""
    return "\n".join(inspect_lines(describe_folder(folder)))


def inspect_lines(found: dict[str, Any]) -> list[str]:
    """``describe_folder``'s result for people."""
    spec, sizes, here = FlatQuantSpec.model_validate(found["spec"]), found["bytes"], found["here"]
    parts = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sizes.items())
    return [
        (
            f"{found['folder']}: {found['model_type']}, {found['blocks']} blocks, {found['tensors']} tensors, "
            f"{sum(sizes.values()) / 1e6:.1f} MB"
        ),
        *spec_lines(spec),
        f"sizes       {parts} MB; {found['bits_per_weight']:.2f} bits for each quantized weight",
        f"shards      {spec.shards} (tensor-parallel sizes that divide it can serve)",
        f"runs here   through the {here['backend']} backend ({here['reason']})",
        f"kernel      {here['kernel']}",
        f"suits here  {here['suitable_scheme']}: {here['suitable_reason']}",
        f"made by     {spec.producer.name} {spec.producer.version}, format version {spec.format_version}",
        f"serve with  vllm serve {quote(found['folder'])}",
        *([] if found["tokenizer"] else [NO_TOKENIZER]),
        *_error_lines(found["errors"]),
        *_end_to_end_lines(found["end_to_end"]),
    ]


def spec_lines(spec: FlatQuantSpec) -> list[str]:
    """What is quantized and transformed, for people."""
    group = f"group {spec.weights.group_size}" if spec.weights.group_size else "per output channel"
    saving = "" if spec.kv.k_bits == spec.kv.v_bits == 16 else " (rounded values; saves no memory yet)"
    sites = []
    for name in (*SITE_NAMES, "k"):
        value = getattr(spec.sites, name)
        if value is not None:
            sites.append(
                f"{name} {value}" if isinstance(value, int) else f"{name} {value.left}x{value.right}"
            )
    return [
        (
            f"scheme      {spec.scheme}: int{spec.weights.bits} weights, {group}; "
            f"{spec.activations.bits}-bit activations per token; {spec.lm_head_bits}-bit lm_head"
        ),
        f"KV cache    K {spec.kv.k_bits} bits, V {spec.kv.v_bits} bits{saving}",
        f"transforms  {', '.join(sites) or 'none'}",
    ]


def _error_lines(errors: list[dict[str, Any]]) -> list[str]:
    if not errors:
        return ["errors      no calibration_log.jsonl"]
    lines = ["errors      mean squared, of each block against its full-precision self"]
    for report in errors:
        before, after = report["error_before"], report["error_after"]
        known = isinstance(before, float) and isinstance(after, float) and before > 0
        start = "before training" if report["trained"] else "at the start"
        share = f"  ({100 * (after / before - 1):+.0f}%)" if known else ""
        numbers = f"{before:.2e} {start}, {after:.2e} finished{share}" if known else "not recorded"
        lines.append(f"  block {report['block']:<4} {numbers}")
    return lines


def _end_to_end_lines(stage: dict[str, Any] | None) -> list[str]:
    if stage is None:
        return []
    before, after = stage["kl_held_out_before"], stage["kl_held_out_after"]
    known = isinstance(before, float) and isinstance(after, float)
    numbers = (
        f"KL divergence {before:.4f} before, {after:.4f} after"
        if known
        else "not judged: no rows kept back"
    )
    return [f"  end to end {numbers}{'; undone' if stage['undone'] else ''}"]


def verify_folder(folder: str, backend: str) -> Iterator[str]:
    """Replay the golden prompt; one line per backend. Raises UserError if the logits at the
    median position, or a best token that led clearly, differ by more than the backend's ``Tolerance``."""
    path = resolve_folder(folder)
    if backend not in ("all", "reference", "vllm"):
        raise UserError(f"backend '{backend}' is unknown; use reference, vllm or all")
    file = folder_file(path, GOLDEN)
    if not file.exists():
        raise UserError(f"{path} has no {GOLDEN}; copy it again from where the checkpoint was made")
    try:
        golden = load_file(file)
        ids, top_ids, top = golden["input_ids"], golden["top_ids"], golden["top_logits"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy it again") from None
    vocabulary = load_config(path).vocab_size
    fits = (
        ids.ndim == 1 and len(ids) > 0 and top_ids.shape == top.shape and top_ids.shape[:1] == ids.shape
    )
    if not fits or not (0 <= ids.min() and max(ids.max(), top_ids.max()) < vocabulary):
        raise UserError(f"{file} does not belong to this checkpoint; copy it again")
    if backend in ("all", "reference"):
        logits = _reference_logits(path, ids)
        yield check_logits("reference", logits, top_ids, top, False, FLOAT32)
    if backend == "vllm" or (backend == "all" and find_spec("vllm")):
        spec = read_spec(path)
        # A checkpoint without activations to quantize is as exact in bf16 as one with 16-bit activations.
        coarse = BFLOAT16[spec.activations.bits if spec else 16]
        on_gpu = torch.cuda.is_available()
        found = _vllm_logprobs(path, ids, top_ids, "bfloat16" if on_gpu else "float32")
        yield check_logits(
            "vllm", found, top_ids, top, True, coarse if on_gpu else FLOAT32, None if on_gpu else coarse
        )


def check_logits(
    name: str,
    found: Tensor,
    top_ids: Tensor,
    top: Tensor,
    logprobs: bool,
    allowed: Tolerance,
    moved: Tolerance | None = None,
) -> str:
    """Compare replayed values with the recorded ones.

    moved: what is allowed instead where the first positions are the recorded ones to ``EXACT``: damage
    shows from the start, a code that rounds the other way only from its position on, and that may be early.

    found: [n, vocabulary] logits, or [n, k] log-probabilities of ``top_ids`` with ``logprobs``.
    top_ids, top: recorded ids and logits [n, k], descending. Returns the line to print.
    """
    if logprobs:
        # Log-probabilities are logits up to a constant per position: compare differences to the first.
        found = found - found[:, :1]
        top = top - top[:, :1]
        values = found
    else:
        values = found.gather(1, top_ids)
    off = (values - top).abs().nan_to_num(nan=float("inf")).amax(dim=1)
    median = off.median().item()
    if moved and median > allowed.median and off[:FIRST].max() < EXACT:
        allowed = moved
    sure = top[:, 0] - top[:, 1] > allowed.margin
    best = values.argmax(dim=1) == 0
    if not logprobs:
        best = found.argmax(dim=1) == top_ids[:, 0]
    wrong = int((sure & ~best).sum())
    if median > allowed.median or wrong:
        raise UserError(
            f"verify {name}: FAILED, median logit difference {median:.4f} (allowed {allowed.median}), {wrong} wrong "
            "top tokens; the checkpoint or this machine's runtime is damaged, copy the folder again"
        )
    return f"verify {name}: ok, {len(top)} positions, median logit difference {median:.4f} (allowed {allowed.median})"


@torch.no_grad()
def _reference_logits(path: Path, ids: Tensor) -> Tensor:
    model = load_reference(path)
    return model(ids[None].long(), use_cache=False).logits[0].float()


def _vllm_logprobs(path: Path, ids: Tensor, top_ids: Tensor, dtype: str) -> Tensor:
    """Log-probabilities of ``top_ids`` [n, k] after each prefix, from one vLLM prompt; -inf if absent."""
    entries = prompt_logprobs(path, [ids.tolist()], dtype, top=2 * top_ids.shape[1])[0]
    lost = float("-inf")
    return torch.tensor(
        [[entry.get(t, lost) for t in row] for entry, row in zip(entries, top_ids.tolist(), strict=True)]
    )
