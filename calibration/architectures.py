"""Which modules of a decoder block share an input and which norm feeds them, per architecture.

All supported families use one naming; a new one is a new entry in ``ARCHITECTURES``.
"""

from dataclasses import dataclass

from ..errors import shown
from .errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Module names inside one decoder block, and where the blocks are."""

    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantized linear of a block, in the order in which the block runs them."""
        return (*self.qkv, self.o, *self.gate_up, self.down)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that share one input."""
        return (self.qkv, (self.o,), self.gate_up, (self.down,))

    def norm_before(self, linear: str) -> str | None:
        """The norm whose output ``linear`` reads; None for o_proj and down_proj."""
        return (
            self.input_norm if linear in self.qkv else self.post_norm if linear in self.gate_up else None
        )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
}
"""model_type of config.json -> names."""


def find_architecture(model_type: str | None) -> Architecture:
    """The table entry for ``model_type``; UserError with the supported list otherwise."""
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise UserError(
        f"model_type '{shown(model_type)}' is not supported; supported are {', '.join(ARCHITECTURES)} "
        "(dense text models)"
    )
