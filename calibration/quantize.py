"""The pipeline: blocks one by one, train, fold, round, export."""

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ..kernels.pack import packing_step
from ..spec import Activations, Factors, FlatQuantSpec, KVCache, Producer, Sites, Weights
from .block import TrainableBlock, check_shards
from .card import model_card, public_name
from .data import calibration_tokens
from .endtoend import LATENT, DistillReport, distill, distill_tokens, finished_hidden
from .errors import UserError
from .export import CheckpointWriter, check_out
from .factors import factor_pair
from .fold import fold_block
from .learned_rotation import rotate_source
from .recipe import Recipe
from .round_block import RoundingReport, round_block
from .source import GOLDEN, ModelSource
from .streams import record_inputs, run_block
from .train import collect_stats, train_block

GOLDEN_TOKENS = 64
GOLDEN_TOP = 8
ERROR_ROWS = 16
"""Rows on which a block's error is measured before and after."""


@dataclass
class BlockReport:
    """One line of calibration_log.jsonl. Errors and losses are mean squared, against the
    full-precision block; a loss is that of one training epoch."""

    block: int
    blocks: int
    error_before: float
    error_after: float
    epoch_losses: list[float]
    skipped_steps: int
    rounding: dict[str, RoundingReport]
    seconds: float
    peak_memory_gb: float


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one; UserError if CUDA is asked for and absent."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{device}' is unknown; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def make_spec(source: ModelSource, recipe: Recipe) -> FlatQuantSpec:
    """The checkpoint's spec; UserError if model and recipe do not fit together."""
    from .. import __version__

    config, arch = source.config, source.arch
    shapes = {n: source.files.shape(f"{source.block_prefix(0)}{n}.weight") for n in arch.linears}
    head_dim = source.head_dim
    heads, hidden = shapes[arch.o][1] // head_dim, shapes[arch.qkv[0]][1]
    intermediate = shapes[arch.down][1]
    kv_heads = shapes[arch.qkv[1]][0] // head_dim
    check_shards(recipe.shards, heads, kv_heads, intermediate)
    context = getattr(config, "max_position_embeddings", recipe.seq_len)
    if recipe.seq_len > context:
        raise UserError(
            f"seq_len={recipe.seq_len} is beyond the model's context of {context} tokens; use --seq-len {context}"
        )
    for name, (_, width) in shapes.items():
        on_a_rank = width // recipe.shards if name in (arch.o, arch.down) else width
        if recipe.group_size and on_a_rank % recipe.group_size:
            raise UserError(
                f"group_size={recipe.group_size} does not divide the input width {on_a_rank} of {name} on a "
                "rank; choose a divisor, or leave the group size out"
            )
        step = packing_step(recipe.weight_bits)
        if on_a_rank % step:
            raise UserError(
                f"{name} has {on_a_rank} inputs on a rank, which {recipe.weight_bits}-bit packing cannot hold: "
                f"it needs a multiple of {step}; choose another scheme"
            )
    online = recipe.transforms

    def factors(site: str, width: int, named: str) -> Factors | None:
        if site not in online:
            return None
        left, right = factor_pair(width, named)
        return Factors(left=left, right=right)

    return FlatQuantSpec(
        producer=Producer(name="vllm-flatquant", version=__version__),
        weights=Weights(bits=recipe.weight_bits, group_size=recipe.group_size),  # type: ignore[arg-type]
        activations=Activations(bits=recipe.activation_bits),  # type: ignore[arg-type]
        kv=KVCache(k_bits=recipe.k_bits, v_bits=recipe.v_bits, symmetric=recipe.kv != 4),  # type: ignore[arg-type]
        shards=recipe.shards,
        sites=Sites(
            qkv=factors("qkv", hidden, "hidden_size"),
            o=heads // recipe.shards if "o" in online else None,
            gate_up=factors("gate_up", hidden, "hidden_size"),
            down=factors("down", intermediate // recipe.shards, "intermediate_size / shards"),
            k=head_dim if recipe.k_bits < 16 else None,
        ),
    )


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    calib: str = "stdlib",
    device: str = "auto",
    overwrite: bool = False,
    on_block: Callable[[BlockReport], None] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Path:
    """Quantize a Hugging Face model into a checkpoint folder that vLLM serves.

    model: folder or hub name. out: folder to make. calib: see ``calibration_tokens``. on_block is called
    after each block, on_progress with the finished fraction of the whole.
    Returns ``out``. Raises UserError for bad input, and leaves nothing half-written.
    """
    out = Path(out).resolve()
    where = choose_device(device)
    check_out(out, overwrite)
    source = ModelSource(model)
    check_out(out, overwrite, source.path)
    spec = make_spec(source, recipe)
    tokens = calibration_tokens(calib, source.path, recipe.samples, recipe.seq_len, recipe.seed)
    source = rotate_source(source, recipe, tokens, where)
    reports: list[BlockReport] = []
    finished: list[dict[str, Tensor]] = []
    try:
        with CheckpointWriter(out, overwrite) as writer:
            x, kwargs = record_inputs(source, tokens, where)
            x = x.to(stream_device(x, where))
            x_q = x.clone() if recipe.follows_quantized else x[:1].clone()
            for i in range(source.num_blocks):
                start = time.monotonic()
                x, x_q, tensors, report = quantize_block(
                    source, i, recipe, spec, x, x_q, kwargs[i], where
                )
                report.seconds = time.monotonic() - start
                finished.append(tensors)
                if not recipe.distill_epochs:
                    writer.add({source.block_prefix(i) + n: t for n, t in finished.pop().items()})
                reports.append(report)
                if on_block:
                    on_block(report)
                if on_progress:
                    on_progress((i + 1) / source.num_blocks)
            others = {n: source.files.tensor(n) for n in source.other_names()}
            log: list[BlockReport | DistillReport] = list(reports)
            if recipe.distill_epochs:
                text = distill_tokens(source, tokens, recipe, where)
                finished, changed, last = distill(
                    source, finished, text, recipe, spec, where, on_progress
                )
                others |= changed
                log.append(last)
                x_q = finished_hidden(source, finished, tokens[:1], spec, where)
                for i, tensors in enumerate(finished):
                    writer.add({source.block_prefix(i) + n: t for n, t in tensors.items()})
            writer.add(others)
            config = {k: v for k, v in source.raw_config.items() if k != "_name_or_path"}  # a local path
            writer.write_side_files(source.path, config, spec)
            writer.write_text("recipe.yaml", recipe.to_yaml(public_name(calib)))
            writer.write_text(
                "calibration_log.jsonl", "".join(json.dumps(asdict(r)) + "\n" for r in log)
            )
            (writer.folder / GOLDEN).write_bytes(save(golden(source, others, tokens[0], x_q[0], where)))
            writer.write_text(
                "README.md",
                model_card(source.path, public_name(model), spec, recipe, public_name(calib)),
            )
            return writer.finish()
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise UserError(
            f"{out} cannot be written ({why}); free space or choose another --out"
        ) from error


def stream_device(x: Tensor, device: torch.device) -> torch.device:
    """Where activations live: the GPU if four streams take less than a quarter of it, else the CPU."""
    if device.type != "cuda":
        return device
    total = torch.cuda.get_device_properties(device).total_memory
    return device if 4 * x.numel() * x.element_size() < total / 4 else torch.device("cpu")


def quantize_block(
    source: ModelSource,
    index: int,
    recipe: Recipe,
    spec: FlatQuantSpec,
    x: Tensor,
    x_q: Tensor,
    kwargs: dict[str, Any],
    device: torch.device,
) -> tuple[Tensor, Tensor, dict[str, Tensor], BlockReport]:
    """Quantize one block.

    x: full-precision stream [N, T, hidden]. x_q: stream of the quantized prefix, [N or 1, T, hidden].
    Returns both streams after the block, the block's checkpoint tensors by relative name, and the report.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    size = recipe.batch_size
    stored = source.block_tensors(index)
    layer = source.load_block(index, device)
    target, stats = collect_stats(layer, source.arch, x, kwargs, size, device)
    if not torch.isfinite(target).all():
        raise UserError(
            f"block {index} gives NaN or inf on the calibration text; the model is damaged or its dtype "
            "overflows"
        )
    block = TrainableBlock(layer, source.arch, recipe, stats, seed=recipe.seed * 1009 + index)
    few = slice(0, min(ERROR_ROWS, len(x)))
    before = block_error(layer, x[few], target[few], kwargs, size, device)
    block.forget()
    inputs = x_q if recipe.chain == "quantized" else x
    trained = train_block(block, layer, inputs, target, kwargs, recipe, device)
    folded = fold_block(block, stored)
    finished = source.load_block(index, device)
    tensors, rounding = round_block(finished, folded, recipe, spec, source, x, x_q, kwargs, device)
    after = block_error(finished, x[few], target[few], kwargs, size, device)
    x_q = run_block(finished, x_q, kwargs, size, device)
    if recipe.distill_epochs:
        tensors |= {n + LATENT: w.float() for n, w in folded.weights.items()}
    report = BlockReport(
        block=index,
        blocks=source.num_blocks,
        error_before=before,
        error_after=after,
        epoch_losses=trained.losses,
        skipped_steps=trained.skipped,
        rounding=rounding,
        seconds=0.0,
        peak_memory_gb=peak_memory(device),
    )
    return target, x_q, tensors, report


def block_error(
    layer: nn.Module,
    x: Tensor,
    target: Tensor,
    kwargs: dict[str, Any],
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean squared difference between the layer's output for x and ``target``, both [N, T, hidden]."""
    return F.mse_loss(run_block(layer, x, kwargs, batch_size, device), target).item()


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB (10^9 bytes): of the GPU since the block began, or of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def golden(
    source: ModelSource,
    others: dict[str, Tensor],
    tokens: Tensor,
    hidden: Tensor,
    device: torch.device,
) -> dict[str, Tensor]:
    """A prompt and the finished model's top logits in float32, for ``flatquant inspect --verify``.

    others: the checkpoint's tensors outside the blocks. tokens: int64 [T]. hidden: output of the last
    finished block [T, hidden].
    Returns input_ids int64 [n], top_ids int64 [n, 8] and top_logits float32 [n, 8], descending.
    """
    model = source.model
    n = min(GOLDEN_TOKENS, len(tokens))
    base = source.arch.blocks.rpartition(".")[0]
    norm = type(model.model.norm)(source.config.hidden_size, source.config.rms_norm_eps).to(device)
    norm.weight.copy_(others[f"{base}.norm.weight"])
    head = "lm_head.weight" if "lm_head.weight" in others else f"{base}.embed_tokens.weight"
    logits = norm(hidden[:n].to(device)) @ others[head].to(device, torch.float32).T
    top = logits.topk(min(GOLDEN_TOP, logits.shape[-1]))
    return {
        "input_ids": tokens[:n].clone(),
        "top_ids": top.indices.cpu(),
        "top_logits": top.values.cpu(),
    }
