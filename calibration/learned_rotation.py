"""SpinQuant (arXiv 2405.16406): learn R1 and R2 by the quantized model's own cross entropy.

The whole model is in memory with fake-quantized activations and KV cache. Its weights keep 16 bits if GPTQ
rounds them afterwards (section 4.3 of the paper), else they are fake-quantized too. The optimizer is Cayley SGD
(arXiv 2002.01113), which stays on the orthogonal matrices.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Stats, TrainableBlock
from .errors import UserError
from .hadamard import random_hadamard
from .meter import free_memory
from .recipe import Recipe
from .reference import load_reference
from .rotation import Rotation, hadamard_rotation, rotate_bias, rotate_weight
from .source import ModelSource

log = logging.getLogger(__name__)
MOMENTUM = 0.9
COPIES = 4
"""Float32 copies of the weights while training: original, rotated, fake-quantized, gradient."""


class CayleySGD(torch.optim.Optimizer):
    """Gradient descent with momentum on orthogonal matrices (arXiv 2002.01113, algorithm 1).

    Momentum M takes the gradient; its projection on the tangent space is ``A X`` with A skew, and the step is
    the Cayley transform ``X <- (I + a/2 A)^-1 (I - a/2 A) X``, solved exactly. The step a is lr, but at most
    the inverse of A's norm, as in the algorithm.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = MOMENTUM):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; matrices without a gradient stay."""
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                m = state.get("momentum", torch.zeros_like(x)) * group["momentum"] + x.grad
                hat = m @ x.mT - 0.5 * x @ (x.mT @ m @ x.mT)
                skew = hat - hat.mT
                state["momentum"] = skew @ x
                bound = torch.linalg.matrix_norm(skew, ord=1) + 1e-8
                half = skew * torch.clamp(1 / bound, max=group["lr"]) / 2
                eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
                x.copy_(torch.linalg.solve(eye + half, (eye - half) @ x))


class SpinNetwork(nn.Module):
    """A whole model whose linears are rotated by trainable matrices and run fake-quantized.

    recipe: its scheme, transforms (those not trained) and fixed clips are used; diagonals and learned clips
    belong to the blocks' own training, later.
    """

    def __init__(self, source: ModelSource, recipe: Recipe, start: Rotation, device: torch.device):
        super().__init__()
        self.arch = arch = source.arch
        self.network: Any = load_reference(source.path, device).requires_grad_(False)
        self.r1 = nn.Parameter(start.r1.float().to(device))
        self.r2 = nn.ParameterList(r.float().to(device) for r in start.r2)
        still = recipe.model_copy(
            update={
                "diag": (),
                "weight_clip": False,
                "activation_clip": fixed(recipe.activation_clip),
                "kv_clip": fixed(recipe.kv_clip),
            }
        )
        unused = torch.empty(0)
        self.blocks: list[TrainableBlock] = []
        self.original: list[dict[str, tuple[Tensor, Tensor | None, Tensor | None]]] = []
        layers: Any = self.network.get_submodule(arch.blocks)
        for i, layer in enumerate(layers):
            norms = {n: layer.get_submodule(n).weight for n in (arch.input_norm, arch.post_norm)}
            gains = {n: w.detach().clone() for n, w in norms.items()}
            linears = {n: layer.get_submodule(n) for n in arch.linears}
            self.original.append(
                {n: (m.weight, m.bias, gains.get(arch.norm_before(n) or "")) for n, m in linears.items()}
            )
            for weight in norms.values():
                weight.data.fill_(1)
            block = TrainableBlock(layer, arch, still, Stats(*[unused] * 4), seed=recipe.seed * 1009 + i)
            block.requires_grad_(False)
            if recipe.rounding != "rtn":
                for name in arch.linears:
                    block.linear(name).weight_bits = 16
            self.blocks.append(block)
        head, norm = self.network.lm_head, self.network.model.norm
        head.weight = nn.Parameter(head.weight * norm.weight, requires_grad=False)
        norm.weight.data.fill_(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of tokens int64 [B, T]."""
        for i, (block, original) in enumerate(zip(self.blocks, self.original, strict=True)):
            block.forget()
            r2 = self.r2[i] if len(self.r2) else None
            for name, (weight, bias, gain) in original.items():
                linear = block.linear(name)
                linear.weight = rotate_weight(self.arch, name, weight, gain, self.r1, r2)
                if bias is not None:
                    linear.bias = rotate_bias(self.arch, name, bias, self.r1, r2)
        base = self.network.model
        hidden = base(inputs_embeds=base.embed_tokens(tokens) @ self.r1, use_cache=False)
        return self.network.lm_head(hidden.last_hidden_state @ self.r1.mT)


def fixed(clip: float | str) -> float:
    """A clip for training without learning it: the number itself, 1 in place of a learned one."""
    return 1.0 if isinstance(clip, str) else clip


def learn_rotation(
    source: ModelSource, recipe: Recipe, tokens: Tensor, device: torch.device
) -> Rotation:
    """Train R1 and every R2 for ``rotation_steps`` steps on tokens int64 [N, T].

    Starts at random Hadamard matrices; the rate falls linearly to zero. Raises UserError if the model does not
    fit in memory.
    """
    check_memory(source, recipe, device)
    generator = torch.Generator().manual_seed(recipe.seed)
    head_dim = source.head_dim
    start = hadamard_rotation(source, recipe.seed)
    start.r2 = [random_hadamard(head_dim, generator) for _ in range(source.num_blocks)]
    network = SpinNetwork(source, recipe, start, device)
    matrices = [network.r1, *network.r2]
    optimizer = CayleySGD(matrices, recipe.rotation_lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.rotation_steps)
    for step in range(recipe.rotation_steps):
        rows = torch.arange(step * recipe.rotation_batch, (step + 1) * recipe.rotation_batch) % len(
            tokens
        )
        batch = tokens[rows].to(device)
        logits = network(batch)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if all(torch.isfinite(m.grad).all() for m in matrices if m.grad is not None):
            optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == recipe.rotation_steps - 1:
            log.info("rotation step %d: cross entropy %.4f", step + 1, loss.item())
    return Rotation(nearest_orthogonal(network.r1), [nearest_orthogonal(r) for r in network.r2])


@torch.no_grad()
def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a nearly orthogonal one, float64 on the CPU (polar decomposition)."""
    u, _, vh = torch.linalg.svd(matrix.detach().cpu().double())
    return u @ vh


def check_memory(source: ModelSource, recipe: Recipe, device: torch.device) -> None:
    """UserError if training the rotations of the whole model would not fit into the free memory."""
    weights = sum(torch.Size(source.files.shape(n)).numel() for n in source.files.names)
    config, tokens = source.config, recipe.rotation_batch * recipe.seq_len
    inner = 8 * config.hidden_size + 4 * config.intermediate_size
    kept = tokens * (source.num_blocks * 2 * inner + 3 * config.vocab_size)
    needed = 4 * (COPIES * weights + kept)
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"learning rotations takes the whole model in memory, about {needed / 1e9:.0f} GB, and "
            f"{free / 1e9:.0f} GB are free; use --recipe quarot-w4a4, which learns none, or a larger machine"
        )


def find_rotation(source: ModelSource, recipe: Recipe, tokens: Tensor, device: torch.device) -> Rotation:
    """The rotation that the recipe asks for, drawn or learned."""
    if recipe.rotation == "hadamard":
        return hadamard_rotation(source, recipe.seed)
    return learn_rotation(source, recipe, tokens, device)
