"""Rotate a model's residual stream and value heads without changing its function, off-line.

QuaRot (arXiv 2404.00456, section 4) and SpinQuant (arXiv 2405.16406, section 3): norm weights go into the
linears that follow, every reader of the residual stream takes R1 from the right, every writer R1 from the left,
and R2 turns each value head between v_proj and o_proj. A rotated model is an ordinary one, with norms of ones
and an lm_head of its own.
"""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .architectures import Architecture
from .block import right_multiply_rows
from .hadamard import random_hadamard
from .source import ModelSource, WeightFiles, meta_model


@dataclass
class Rotation:
    """R1 [hidden, hidden] of the residual stream, and R2 [head_dim, head_dim] of each block (or none).

    Row vectors: the stream becomes ``x R1``, a value head ``v R2``. Both orthogonal.
    """

    r1: Tensor
    r2: list[Tensor] = field(default_factory=list)

    def value(self, block: int) -> Tensor | None:
        """R2 of a block."""
        return self.r2[block] if self.r2 else None

    def save(self, file: Path) -> None:
        """Write the matrices to a safetensors file."""
        r2 = {f"r2.{i}": r.contiguous() for i, r in enumerate(self.r2)}
        save_file({"r1": self.r1.contiguous(), **r2}, file)

    @classmethod
    def load(cls, file: Path) -> "Rotation":
        """The matrices that ``save`` wrote."""
        tensors = load_file(file)
        return cls(tensors["r1"], [tensors[f"r2.{i}"] for i in range(len(tensors) - 1)])


def hadamard_rotation(source: ModelSource, seed: int) -> Rotation:
    """QuaRot's R1: a Hadamard matrix with random signs, float64."""
    generator = torch.Generator().manual_seed(seed)
    return Rotation(random_hadamard(source.config.hidden_size, generator))


def rotate_weight(
    arch: Architecture, name: str, weight: Tensor, gain: Tensor | None, r1: Tensor, r2: Tensor | None
) -> Tensor:
    """Weight [out, in] of the block's linear ``name`` in the rotated model, in weight's dtype.

    gain: weight [in] of the norm in front of it; None for o_proj and down_proj, which have none.
    """
    if gain is not None:
        weight = (weight * gain) @ r1
        return (
            right_multiply_rows(weight, r2[None]) if r2 is not None and name == arch.qkv[2] else weight
        )
    if r2 is not None and name == arch.o:
        weight = (weight.unflatten(1, (-1, len(r2))) @ r2).flatten(1)
    return r1.mT @ weight


def rotate_bias(arch: Architecture, name: str, bias: Tensor, r1: Tensor, r2: Tensor | None) -> Tensor:
    """Bias [out] of the block's linear ``name`` in the rotated model."""
    if name in (arch.o, arch.down):
        return bias @ r1
    if r2 is not None and name == arch.qkv[2]:
        return right_multiply_rows(bias[:, None], r2[None])[:, 0]
    return bias


class RotatedFiles(WeightFiles):
    """The tensors of a rotated model, each computed from the original's when it is read.

    Computed in float64 on ``device``. Linear weights come back as float32 (they are rounded later); what a
    checkpoint keeps as it is (embedding, norms, biases, lm_head) in the stored dtype.
    """

    def __init__(
        self,
        files: WeightFiles,
        arch: Architecture,
        tied: bool,
        rotation: Rotation,
        device: torch.device,
    ):
        self.path = files.path
        self.files, self.arch, self.rotation, self.device = files, arch, rotation, device
        self.r1 = rotation.r1.to(device, torch.float64)
        base = arch.blocks.rpartition(".")[0]
        self.embedding, self.norm, self.head = (
            f"{base}.embed_tokens.weight",
            f"{base}.norm.weight",
            "lm_head.weight",
        )
        # Rotations are square, so shapes and dtypes are the originals'; a tied head is the embedding.
        self.original_head = self.embedding if tied else self.head
        self.stored = {**files.stored, self.head: files.stored[self.original_head]}

    def _wide(self, name: str, check: bool) -> Tensor:
        return self.files.tensor(name, check).to(self.device, torch.float64)

    def tensor(self, name: str, check: bool = True) -> Tensor:
        """The rotated tensor on the CPU; UserError if the original holds NaN or inf."""
        arch = self.arch
        dtype, r1 = self.dtype(name), self.r1
        if name == self.norm:
            return torch.ones_like(self.files.tensor(name, check))
        if name == self.embedding:
            return (self._wide(name, check) @ r1).to(dtype).cpu()
        if name == self.head:
            return (
                ((self._wide(self.original_head, check) * self._wide(self.norm, check)) @ r1)
                .to(dtype)
                .cpu()
            )
        match = re.fullmatch(rf"{re.escape(arch.blocks)}\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            return self.files.tensor(name, check)
        block, module, kind = match.groups()
        if module in (arch.input_norm, arch.post_norm):
            return torch.ones_like(self.files.tensor(name, check))
        if module not in arch.linears:
            return self.files.tensor(name, check)
        r2 = self.rotation.value(int(block))
        r2 = r2.to(self.device, torch.float64) if r2 is not None else None
        value = self._wide(name, check)
        if kind == "bias":
            return rotate_bias(arch, module, value, r1, r2).to(dtype).cpu()
        norm = arch.norm_before(module)
        gain = self._wide(f"{arch.blocks}.{block}.{norm}.weight", check) if norm else None
        return rotate_weight(arch, module, value, gain, r1, r2).float().cpu()


def rotated(source: ModelSource, rotation: Rotation, device: torch.device) -> ModelSource:
    """The rotated model as a source of its own: same function, norms of ones, an untied lm_head."""
    new = copy.copy(source)
    tied = bool(getattr(source.config, "tie_word_embeddings", False))
    new.files = RotatedFiles(source.files, source.arch, tied, rotation, device)
    new.raw_config = {**source.raw_config, "tie_word_embeddings": False}
    new.config = copy.deepcopy(source.config)
    new.config.tie_word_embeddings = False
    new.model = meta_model(new.config)
    return new
