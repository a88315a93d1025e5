"""The last stage: train the whole finished checkpoint against the full-precision model's logits.

Loss: KL(full precision || quantized) of the next-token distributions, mean over tokens (knowledge distillation,
arXiv 1503.02531; for quantized language models LLM-QAT, arXiv 2305.17888). Everything that the checkpoint holds
moves: on-line factors, clips, norms, weight scales, KV matrices and, through straight-through rounding, the
integer codes. All blocks are in memory at once, so this is for models that fit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from ..spec import FlatQuantSpec
from .errors import UserError
from .golden import embedding_name, norm_name
from .head import HEAD
from .meter import free_memory
from .recipe import Recipe
from .reference import install_block, load_reference
from .source import ModelSource
from .steps import MeanLoss, Steps, cosine
from .streams import batches, record_inputs, run_block
from .student import Form, StudentBlock, Tunable

LATENT = ".latent"
"""Suffix of a linear's weight before rounding, among a block's tensors, while a last stage needs it."""
WARMUP = 0.05
"""Part of the steps over which the rate rises."""
GENERATION_CACHE = 8 * 10**9
"""Bytes of KV cache while the model writes rows."""
PROMPT = 32
"""Tokens of a calibration row that the model continues."""
HELD_OUT, HELD_OUT_PART = 8, 4
"""So many calibration rows, but at most one of so many, are not trained on: they judge the training."""


@dataclass
class DistillReport:
    """Mean KL divergence in nats per token: of the training's first and last epoch, and of calibration rows that it
    did not see, before and after it (None if there are none)."""

    kl_first_epoch: float
    kl_last_epoch: float
    skipped_steps: int
    kl_held_out_before: float | None
    kl_held_out_after: float | None

    @property
    def worse(self) -> bool:
        """Whether the held-out rows got no better, or broke."""
        before, after = self.kl_held_out_before, self.kl_held_out_after
        return before is not None and after is not None and not after < before

    def __str__(self) -> str:
        if self.kl_held_out_before is None:
            return (
                "end-to-end stage: KL divergence from the unquantized model on the text of the training "
                f"{self.kl_first_epoch:.4f} in the first epoch, "
                f"{self.kl_last_epoch:.4f} in the last (nats per token); nothing tells whether that helps other text, "
                f"as fewer than {HELD_OUT_PART} calibration rows leave none to judge by; use more --samples"
            )
        change = (
            "end-to-end stage: KL divergence from the unquantized model on held-out calibration rows "
            f"{self.kl_held_out_before:.4f} -> {self.kl_held_out_after:.4f} nats per token"
        )
        undone = ", so it was undone; give it more text or a smaller distill_lr" if self.worse else ""
        return change + undone


def memory_needed(source: ModelSource, recipe: Recipe) -> tuple[int, int, int]:
    """Bytes of training the whole model: (weights, kept activations, embedding and head).

    A weight takes its latent, gradient and AdamW's moments (16 bytes), 16 of what a step keeps of rounding it and 4
    in the full-precision model beside it. A token leaves, in float32, 24 numbers for each hidden channel of a block,
    7 for each intermediate one and 8 for each entry of the vocabulary (counted on the CPU with a 4-bit KV cache,
    rounded up). An entry of the embedding or the head takes 8 bytes, 28 if it is trained.
    """
    config, linears = source.config, source.arch.linears
    shapes = [source.files.shape(f"{source.block_prefix(0)}{name}.weight") for name in linears]
    block = 24 * config.hidden_size + 7 * config.intermediate_size
    kept = recipe.distill_rows * recipe.seq_len * (source.num_blocks * block + 8 * config.vocab_size)
    weights = source.num_blocks * sum(math.prod(shape) for shape in shapes)
    tables = (1 if is_tied(source) else 2) * config.vocab_size * config.hidden_size
    return 36 * weights, 4 * kept, (28 if recipe.distill_table_lr else 8) * tables


def check_memory(source: ModelSource, recipe: Recipe, device: torch.device) -> None:
    """UserError if this stage would not fit into the free memory."""
    needed, free = sum(memory_needed(source, recipe)), free_memory(device)
    if needed > free:
        raise UserError(
            f"training the whole model on its logits takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
            "are free; use a recipe without e2e in its name, set distill_epochs: 0, or lower distill_batch_size or seq_len"
        )


def is_tied(source: ModelSource) -> bool:
    """Whether the head is the embedding."""
    return source.config.tie_word_embeddings or HEAD not in source.files


class Ends(nn.Module):
    """What is outside the blocks, in float32: embedding, final norm and head.

    The norm's weight is trained; the two tables are if ``trained``.
    """

    def __init__(self, source: ModelSource, device: torch.device, trained: bool = False):
        super().__init__()
        files = source.files
        self.trained = trained

        def tunable(name: str, form: Form) -> Tunable:
            tensor = files.tensor(name)
            kept = None if tensor.dtype == torch.float32 else tensor.dtype
            self.stored[name] = tensor.dtype
            return Tunable(tensor.to(device), form, kept)

        self.stored: dict[str, torch.dtype] = {}
        self.names = [norm_name(source), embedding_name(source)]
        self.gain = tunable(self.names[0], "log")
        self.tables = nn.ModuleList([tunable(self.names[1], "linear")])
        if not is_tied(source):
            self.names.append(HEAD)
            self.tables.append(tunable(self.names[2], "linear"))
        self.tables.requires_grad_(trained)
        self.norm = type(source.model.model.norm)(source.config.hidden_size, source.config.rms_norm_eps)
        self.norm.weight.requires_grad_(False)
        self.to(device)

    def table(self, index: int) -> Tensor:
        """The present embedding (0) or head (-1), [vocabulary, hidden]."""
        return self.tables[index]() if self.trained else self.tables[index].base  # type: ignore[return-value]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block [..., hidden] for tokens [...]."""
        return F.embedding(tokens, self.table(0))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden [..., hidden]."""
        return self.logits(hidden, self.gain(), self.table(-1))

    def logits(self, hidden: Tensor, gain: Tensor, head: Tensor) -> Tensor:
        """``forward`` for any weight [hidden] of the norm and head [vocabulary, hidden]."""
        return F.linear(torch.func.functional_call(self.norm, {"weight": gain}, (hidden,)), head)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """What was trained, under full names in the dtypes that came in."""
        parts = [self.gain, *(self.tables if self.trained else ())]
        return {n: p().to(self.stored[n]) for n, p in zip(self.names, parts, strict=False)}


class Teacher(nn.Module):
    """The full-precision model, whole on one device in float32. ends: the student's, from whose starts it reads."""

    def __init__(self, source: ModelSource, ends: Ends, device: torch.device):
        super().__init__()
        self.blocks = nn.ModuleList(source.load_block(i, device) for i in range(source.num_blocks))
        self.ends = [ends]  # owned by the student

    @torch.no_grad()
    def forward(self, tokens: Tensor, kwargs: list[dict[str, Any]]) -> Tensor:
        """Logits [N, T, vocabulary] of tokens int64 [N, T]; kwargs: each block's other arguments."""
        (ends,) = self.ends
        x = F.embedding(tokens, ends.tables[0].base)  # type: ignore[arg-type]
        for block, arguments in zip(self.blocks, kwargs, strict=True):
            x = block(x, **arguments)
        return ends.logits(x, ends.gain.base, ends.tables[-1].base)  # type: ignore[arg-type]


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(teacher) || softmax(student)), logits [..., vocabulary]."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return total / (student.numel() // student.shape[-1])


@torch.no_grad()
def generated_tokens(
    source: ModelSource,
    tokens: Tensor,
    count: int,
    seed: int,
    device: torch.device,
    on_progress: Callable[[float], None] | None = None,
) -> Tensor:
    """``count`` rows int64 [count, T] that the full-precision model samples (LLM-QAT's data, temperature 1).

    Each row continues a piece of ``PROMPT`` tokens from calibration rows, tokens [N, T], drawn by ``seed``; nothing
    but the model and the calibration text goes in, and of that no row that judges the training (``held_out``).
    """
    tokens = tokens[: held_out(len(tokens)).start]
    draw = torch.Generator().manual_seed(seed)
    length = min(PROMPT, tokens.shape[1] // 2)
    rows = torch.randint(len(tokens), (count,), generator=draw)
    starts = torch.randint(tokens.shape[1] - length + 1, (count,), generator=draw)
    prompts = torch.stack(
        [tokens[r, s : s + length] for r, s in zip(rows.tolist(), starts.tolist(), strict=True)]
    )
    network: Any = load_reference(source.path, device)
    if device.type == "cuda":
        network.to(torch.bfloat16)  # half the cache traffic, which is what writing waits for
    network.generation_config = GenerationConfig()  # no end of text: rows are full
    network.config.eos_token_id = None
    wanted = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens.shape[1] - length,
        pad_token_id=0,
        cache_implementation="static",  # a growing one leaves holes of every size in the GPU's memory
        disable_compile=True,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        size = generation_batch(source, tokens.shape[1])
        parts: list[Tensor] = []
        for p in batches(prompts, size, device):
            mask = torch.ones_like(p)  # without it, token 0 would count as padding
            parts.append(network.generate(p, attention_mask=mask, generation_config=wanted))
            if on_progress:
                on_progress(sum(map(len, parts)) / count)
    return torch.cat(parts).cpu()


def generation_batch(source: ModelSource, length: int) -> int:
    """Rows of ``length`` tokens that are written at once: their KV cache, counted in float32, takes at most
    ``GENERATION_CACHE`` bytes."""
    kv_width = source.files.shape(f"{source.block_prefix(0)}{source.arch.qkv[1]}.weight")[0]
    row = 2 * source.num_blocks * kv_width * length * 4
    return min(1024, max(1, GENERATION_CACHE // row))


def distill_tokens(
    source: ModelSource,
    tokens: Tensor,
    recipe: Recipe,
    device: torch.device,
    on_progress: Callable[[float], None] | None = None,
) -> Tensor:
    """The text of this stage: calibration rows [N, T] and the recipe's generated ones, int64 [N + more, T]."""
    if not recipe.distill_generated:
        return tokens
    more = generated_tokens(source, tokens, recipe.distill_generated, recipe.seed, device, on_progress)
    return torch.cat([tokens, more])


def make_students(
    source: ModelSource, blocks: list[dict[str, Tensor]], spec: FlatQuantSpec, device: torch.device
) -> list[StudentBlock]:
    """Trainable blocks of the tensors of finished ones (latent weights under ``LATENT`` names)."""
    scale_dtype = None
    if spec.activations.bits == 16:
        scale_dtype = source.scale_dtype
    students = []
    for i, tensors in enumerate(blocks):
        latents = {n.removesuffix(LATENT): t for n, t in tensors.items() if n.endswith(LATENT)}
        kept = {n: t for n, t in tensors.items() if not n.endswith(LATENT)}
        layer = source.load_block(i, device)
        students.append(StudentBlock(layer, kept, latents, spec, source.arch, scale_dtype))
    return students


def parameter_groups(students: nn.ModuleList, ends: Ends, recipe: Recipe) -> list[dict[str, Any]]:
    """Optimizer groups: latent weights (in quantization steps), clips, embedding and head, and the rest."""
    named = [*students.named_parameters(), ("gain.change", ends.gain.change)]
    named = [(n, p) for n, p in named if n.endswith((".change", ".steps"))]
    weights = [p for n, p in named if n.endswith(".steps")]
    clips = [p for n, p in named if n.endswith("clip.change")]
    rest = [p for n, p in named if not n.endswith((".steps", "clip.change"))]
    groups = [
        {"params": rest, "lr": recipe.distill_lr},
        {"params": clips, "lr": recipe.distill_lr * recipe.clip_lr_factor},
    ]
    if ends.trained:
        groups.append({"params": [*ends.tables.parameters()], "lr": recipe.distill_table_lr})
    if recipe.distill_weight_lr > 0:
        groups.append({"params": weights, "lr": recipe.distill_weight_lr})
    else:
        for p in weights:
            p.requires_grad_(False)
    return groups


def distill(
    source: ModelSource,
    blocks: list[dict[str, Tensor]],
    tokens: Tensor,
    recipe: Recipe,
    spec: FlatQuantSpec,
    device: torch.device,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], DistillReport]:
    """Train a finished checkpoint end to end.

    blocks: each block's checkpoint tensors by relative name, and its linears' weights before rounding under
    ``NAME.latent``. tokens: int64 [N, T], all text of the stage (``distill_tokens``), calibration rows first.
    Returns the blocks' new tensors (same names, without the latents), changed tensors outside the blocks by
    full name, and the report. AdamW, linear warm-up then cosine to zero, rows in a new order each epoch; a
    step with a non-finite loss or gradient is skipped and counted. The report says what rows that are kept from the
    training (``held_out``) make of it; the caller decides.
    """
    kwargs = record_inputs(source, tokens[:1], device)[1]
    students = nn.ModuleList(make_students(source, blocks, spec, device))
    ends = Ends(source, device, recipe.distill_table_lr > 0)
    teacher = Teacher(source, ends, device)
    groups = parameter_groups(students, ends, recipe)
    judges = held_out(min(recipe.samples, len(tokens)))
    rest = torch.tensor([i for i in range(len(tokens)) if i not in judges])
    per_epoch = -(-len(rest) // recipe.distill_rows)
    steps = recipe.distill_epochs * per_epoch

    def loss(rows: Tensor) -> Tensor:
        target = teacher(rows, kwargs)
        return kl_divergence(ends(run_students(students, ends.embed(rows), kwargs)), target)

    @torch.no_grad()
    def judged() -> float | None:
        if not judges:
            return None
        return sum(float(loss(tokens[i : i + 1].to(device))) for i in judges) / len(judges)

    before = judged()
    trainer = Steps(loss, groups, cosine(steps, WARMUP), device, precision=recipe.precision)
    shuffle = torch.Generator().manual_seed(recipe.seed)
    losses: list[MeanLoss] = []
    for epoch in range(recipe.distill_epochs):
        losses.append(MeanLoss(device))
        order = rest[torch.randperm(len(rest), generator=shuffle)]
        for i, rows in enumerate(order.split(recipe.distill_rows)):
            losses[-1].add(trainer.step(tokens[rows].to(device)), len(rows))
            if on_progress:
                on_progress((epoch * per_epoch + i + 1) / steps)
    after = judged()
    report = DistillReport(float(losses[0]), float(losses[-1]), int(trainer.skipped), before, after)
    exported = [s.export() for s in students]  # type: ignore[operator]
    return exported, ends.export(), report


def held_out(samples: int) -> range:
    """Which calibration rows judge the last stage instead of training it: the last few, none of less than four."""
    return range(samples - min(HELD_OUT, samples // HELD_OUT_PART), samples)


@torch.no_grad()
def finished_hidden(
    source: ModelSource,
    blocks: list[dict[str, Tensor]],
    tokens: Tensor,
    spec: FlatQuantSpec,
    device: torch.device,
    embedding: Tensor | None = None,
) -> Tensor:
    """Last hidden state [N, T, hidden] of finished blocks (tensors by relative name), on the references.

    embedding: [vocabulary, hidden], if it is not the source's.
    """
    x, kwargs = record_inputs(source, tokens, device)
    if embedding is not None:
        x = F.embedding(tokens, embedding.float().cpu())
    x = x.to(device)
    for i, tensors in enumerate(blocks):
        layer = source.load_block(i, device)
        install_block(layer, tensors, spec, source.arch)
        x = run_block(layer, x, kwargs[i], 1, device)
    return x


def run_students(students: nn.ModuleList, x: Tensor, kwargs: list[dict[str, Any]]) -> Tensor:
    """Hidden state after the last block [N, T, hidden]; kwargs: each block's other arguments."""
    for student, arguments in zip(students, kwargs, strict=True):
        x = student(x, arguments)
    return x
