"""The checkpoint contract: ``quantization_config`` of config.json, format version 1.

Shared by calibration (writes it) and the plugin (reads it). docs/format.md describes the tensors that
go with it. Unknown keys and newer versions are refused.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import shown

FORMAT_VERSION = 1
QUANT_METHOD = "flatquant"
SCHEMES: dict[str, tuple[int, int]] = {
    f"w{weights}a{activations}": (weights, activations)
    for weights, activations in (
        *((4, 4), (4, 8), (4, 16)),
        *((8, 8), (8, 16)),
        *((3, 4), (3, 8), (3, 16)),
        *((2, 4), (2, 8), (2, 16)),
    )
}
"""Scheme name -> (weight bits, activation bits): what some runtime can serve.

The 4-bit kernels run 2- and 3-bit weights as well: a smaller checkpoint, not less memory at run time."""
LAYOUTS = {2: "int2_low_bits_first", 3: "int3_low_bits_first", 4: "int4_low_nibble_even", 8: "int8"}
"""Weight bits -> name of the layout on disk (docs/format.md, ``kernels.pack.pack_codes``)."""


class SpecError(ValueError):
    """A quantization config that this version cannot use; the message names the key and the fix."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Producer(_Strict):
    """Who wrote the checkpoint."""

    name: str
    version: str


class Weights(_Strict):
    """Integer weights. ``group_size`` None means one scale per output channel."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=None, gt=0)
    symmetric: Literal[True] = True
    layout: str = ""

    @model_validator(mode="before")
    @classmethod
    def _own_layout(cls, data: Any) -> Any:
        if isinstance(data, dict) and "layout" not in data:
            bits = data.get("bits", 4)
            return {**data, "layout": LAYOUTS.get(bits, "") if isinstance(bits, int) else ""}
        return data

    @model_validator(mode="after")
    def _known_layout(self) -> "Weights":
        if self.layout != LAYOUTS[self.bits]:
            raise ValueError(
                f"layout '{self.layout}' is not that of {self.bits}-bit weights; "
                f"it must be '{LAYOUTS[self.bits]}'"
            )
        return self


class Activations(_Strict):
    """Per-token, symmetric activations; 16 means not quantized."""

    bits: Literal[4, 8, 16]


class KVCache(_Strict):
    """KV cache, per token and head: 8 bits symmetric, 4 bits asymmetric, 16 not quantized."""

    k_bits: Literal[4, 8, 16] = 16
    v_bits: Literal[4, 8, 16] = 16
    symmetric: bool = True

    @model_validator(mode="after")
    def _symmetry(self) -> "KVCache":
        if 4 in (self.k_bits, self.v_bits) and self.symmetric:
            raise ValueError("a 4-bit KV cache is asymmetric; set symmetric to false")
        if 8 in (self.k_bits, self.v_bits) and not self.symmetric:
            raise ValueError("an 8-bit KV cache is symmetric; set symmetric to true")
        return self


class Factors(_Strict):
    """Sizes of one Kronecker transform: ``shards`` blocks of ``left * right``."""

    left: int = Field(gt=0)
    right: int = Field(gt=0)


class Sites(_Strict):
    """On-line transforms, by site; None means that the site has none.

    qkv, gate_up: of the hidden size. down: of ``intermediate_size / shards``. o: size of the head-axis
    matrix, query heads / shards. k: head_dim, present only if K is quantized.
    """

    qkv: Factors | None = None
    o: int | None = Field(default=None, gt=0)
    gate_up: Factors | None = None
    down: Factors | None = None
    k: int | None = Field(default=None, gt=0)


class FlatQuantSpec(_Strict):
    """The whole ``quantization_config``. ``ignore`` names modules that keep their 16-bit weights.

    lm_head_bits: 8 for a head of int8 codes with one scale per row.
    """

    quant_method: Literal["flatquant"] = "flatquant"
    format_version: Literal[1] = 1
    producer: Producer
    weights: Weights
    activations: Activations
    kv: KVCache = KVCache()
    shards: int = Field(default=1, gt=0)
    transform_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    lm_head_bits: Literal[8, 16] = 16
    ignore: list[str] = ["lm_head"]
    sites: Sites

    @model_validator(mode="after")
    def _servable(self) -> "FlatQuantSpec":
        if self.scheme not in SCHEMES:
            raise ValueError(
                f"weights.bits={self.weights.bits} with activations.bits={self.activations.bits} has no "
                f"kernel; use one of {', '.join(SCHEMES)}"
            )
        if self.weights.group_size is not None and self.activations.bits != 16:
            raise ValueError(
                f"weights.group_size={self.weights.group_size} with activations.bits="
                f"{self.activations.bits} cannot be served; use activations.bits=16 or no group_size"
            )
        if self.lm_head_bits < 16 and "lm_head" in self.ignore:
            raise ValueError("lm_head_bits=8, but ignore lists lm_head; take it out of ignore")
        if (self.sites.k is None) != (self.kv.k_bits == 16):
            raise ValueError("sites.k must be set exactly when kv.k_bits is below 16")
        return self

    @property
    def scheme(self) -> str:
        """Name for people, such as ``w4a4``."""
        return f"w{self.weights.bits}a{self.activations.bits}"


def foreign_tool(config: Mapping[str, Any]) -> str | None:
    """Which other FlatQuant tool wrote this ``quantization_config``, or the file beside the weights that it
    has instead; None if no known one did."""
    if config.get("format") == "pack-quantized" and "config_groups" in config:
        return "a SqueezeBits FlatQuant W4A16 folder"
    if "online_trans" in config or config.get("format") == "packed_int4":
        return "a folder of the official FlatQuant code's quantized weights (RealQuant)"
    if "FLATQUANT" in str(config.get("model_quant_type", config.get("quantize", ""))):
        return "a vllm-ascend FlatQuant folder (msmodelslim)"
    return None


def foreign_message(what: str, tool: str) -> str:
    """What to do with a checkpoint of another tool."""
    return (
        f"{what} is that of {tool}, which vllm-flatquant does not serve as it is; convert the folder with "
        "`flatquant convert FOLDER --out NEW` and serve NEW"
    )


def parse_spec(config: dict[str, Any]) -> FlatQuantSpec:
    """Check ``config`` (the ``quantization_config`` of config.json) and return it typed.

    Raises SpecError with one sentence that names the key and what to do.
    """
    version = config.get("format_version")
    if version is None:
        tool = foreign_tool(config)
        if tool is not None:
            raise SpecError(foreign_message("quantization_config", tool))
        raise SpecError(
            "quantization_config says quant_method 'flatquant' but has no format_version: another tool "
            "wrote it; re-quantize the original model with `flatquant quantize`"
        )
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise SpecError(
            f"quantization_config.format_version is {shown(version)}, this version of vllm-flatquant reads up "
            f"to {FORMAT_VERSION}; upgrade vllm-flatquant"
        )
    try:
        return FlatQuantSpec.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = shown(".".join(str(part) for part in first["loc"]))
        name = f"quantization_config.{key}" if key else "quantization_config"
        if first["type"] == "extra_forbidden":
            why = "unknown key; remove it or upgrade vllm-flatquant"
        else:
            why = shown(first["msg"].removeprefix("Value error, "), 300)
        raise SpecError(f"{name}: {why}") from None
