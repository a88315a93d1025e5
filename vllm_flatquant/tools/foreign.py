"""What readers of other tools' FlatQuant folders share: a model as blocks of our tensors, and how what
cannot be kept exactly is approximated and told."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..calibration.architectures import Architecture, find_architecture
from ..calibration.errors import UserError
from ..calibration.source import WeightFiles
from ..errors import CheckpointError
from ..files import check_sizes
from ..spec import (
    SCHEMES,
    Activations,
    Factors,
    FlatQuantSpec,
    KVCache,
    Producer,
    Sites,
    Weights,
)

OWNERS = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}
"""Site -> the sub-module that has its transform."""


@dataclass
class ForeignModel:
    """A model of another tool, in our terms.

    config: config.json without its quantization_config. side: the folder with the tokenizer. base: public
    name of the original model. origin: a sentence for the model card. tensors: everything under our names,
    in parts; ``notes`` is complete when it is exhausted.
    """

    config: dict[str, Any]
    side: Path
    base: str
    origin: str
    spec: FlatQuantSpec
    tensors: Iterator[dict[str, Tensor]]
    notes: list[str] = field(default_factory=list)


class Clips:
    """Collects the activation clips of the linears that share a site, and tells what merging them cost.

    Ours has one ratio for each site, of the absolute maximum. Others have one for each linear, or one for
    the maximum and one for the minimum. The largest is kept: it cuts off least.
    """

    def __init__(self) -> None:
        self.sites = self.merged = 0
        self.spread = 0.0

    def merge(self, ratios: list[float]) -> Tensor:
        """One ratio, float32 [1], for the given ones."""
        self.sites += 1
        spread = max(ratios) - min(ratios)
        if spread > 1e-6:
            self.merged += 1
            self.spread = max(self.spread, spread)
        return torch.tensor([max(ratios)], dtype=torch.float32)

    def notes(self) -> list[str]:
        """What happened, in at most one sentence."""
        if not self.merged:
            return []
        return [
            (
                f"{self.merged} of {self.sites} sites had different activation clips for their linears or for "
                f"maximum and minimum (by up to {self.spread:.3f}); the largest was kept for all of a site"
            )
        ]


def base_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], Architecture]:
    """config.json without what quantized it and whose path it was, and its architecture; UserError if that
    is not supported or a size is missing."""
    arch = find_architecture(config.get("model_type"))
    try:
        check_sizes(config, ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    except CheckpointError as error:
        raise UserError(str(error)) from None
    dropped = ("quantization_config", "quantize", "_name_or_path")
    return {k: v for k, v in config.items() if k not in dropped}, arch


def base_name(config: Mapping[str, Any], path: Path) -> str:
    """Public name of the original model: what config.json calls it, else the folder's own name."""
    named = str(config.get("_name_or_path") or "").rstrip("/")
    return named if named.count("/") == 1 else Path(named or path.resolve()).name


def need(files: WeightFiles, name: str) -> Tensor:
    """A tensor of the source; UserError if it is not there."""
    if name not in files:
        raise UserError(f"{files.path} lacks tensor {name}; download the folder again")
    return files.tensor(name)


def make_spec(
    scheme: str,
    kv: int,
    factors: Mapping[str, tuple[int, ...]],
    producer: str,
    transform_dtype: str = "bfloat16",
    group_size: int | None = None,
    ignore: list[str] | None = None,
) -> FlatQuantSpec:
    """The spec of a converted model. factors: site -> sizes, (a, b), or (n,) for o and k."""
    if scheme not in SCHEMES:
        raise UserError(f"scheme '{scheme}' is unknown; use one of {', '.join(SCHEMES)}")
    if kv not in (4, 16):
        raise UserError(
            f"kv={kv}: these tools quantize keys and values to 4 bits or not at all; use 4 or 16"
        )
    pairs = {n: Factors(left=s[0], right=s[1]) for n, s in factors.items() if len(s) == 2}
    single = {n: s[0] for n, s in factors.items() if len(s) == 1}
    return FlatQuantSpec(
        producer=Producer(name=f"vllm-flatquant convert ({producer})", version=__version__),
        weights=Weights(bits=SCHEMES[scheme][0], group_size=group_size),  # type: ignore[arg-type]
        activations=Activations(bits=SCHEMES[scheme][1]),  # type: ignore[arg-type]
        kv=KVCache(k_bits=kv, v_bits=kv, symmetric=kv != 4),  # type: ignore[arg-type]
        transform_dtype=transform_dtype,  # type: ignore[arg-type]
        ignore=["lm_head", *(ignore or [])],
        sites=Sites(**pairs, **single),  # type: ignore[arg-type]
    )
