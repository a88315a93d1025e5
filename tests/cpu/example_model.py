"""Checkpoints of the example model by recipe, with their perplexity on its held-out text."""

import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_flatquant.calibration.data import evaluation_tokens
from vllm_flatquant.calibration.evaluate import perplexity, windows
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipes import choose_recipe
from vllm_flatquant.calibration.reference import load_reference

from .tiny_model import edit_weights

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llama"


@dataclass
class Checkpoints:
    """Quantizes each recipe once into ``folder``; perplexity over ``count`` windows of 512 tokens."""

    folder: Path
    count: int
    model: Path = MODEL
    known: dict[tuple, tuple[float, Path]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        """The windows, int64 [count, 512]."""
        return windows(
            evaluation_tokens(MODEL, str(EXAMPLES / "heldout.txt"), None, None), 512, self.count
        )

    def make(self, name: str, **settings: Any) -> tuple[float, Path]:
        """(perplexity, folder) of the recipe ``name`` with ``settings`` changed."""
        key = (name, *sorted(settings.items()))
        if key not in self.known:
            recipe = choose_recipe(name, **settings).recipe
            out = quantize(self.model, self.folder / str(len(self.known)), recipe, "stdlib", "cpu")
            self.known[key] = perplexity(load_reference(out), self.rows), out
        return self.known[key]


def with_outliers(folder: Path, channels: int = 4, factor: int = 2**7) -> Path:
    """A copy of the example model in ``folder`` that computes the same, with ``channels`` outliers in the inputs
    of q, k, v and of gate, up: norm weights times ``factor``, weight columns divided by it (a power of two)."""
    shutil.copytree(MODEL, folder)

    def rescale(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                tensor[:channels] *= factor
            elif name.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
            ):
                tensor[:, :channels] /= factor

    edit_weights(folder, rescale)
    return folder
