"""What to do to a model: one typed recipe, kept in the checkpoint as recipe.yaml."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..spec import SCHEMES
from .errors import UserError

SHARDS = (1, 2, 4, 8)
"""Tensor-parallel sizes that a transform can be split for."""


TransformName = Literal["qkv", "o", "gate_up", "down", "k", "v"]
SiteName = Literal["qkv", "o", "gate_up", "down"]
TRANSFORMS: tuple[TransformName, ...] = ("qkv", "o", "gate_up", "down", "k", "v")
DIAGONALS: tuple[SiteName, ...] = ("qkv", "gate_up", "down")
"""FlatQuant's diagonals: where a norm or up_proj can take them."""


ONE_LINE = r"^[^\n\r]{0,200}$"
"""Both names are printed in the model card."""


class Recipe(BaseModel):
    """Every choice that decides the numbers of a checkpoint.

    system, paper: whose method this is. scheme: a key of ``spec.SCHEMES``. kv: bits of the KV cache. lm_head: bits of the head.
    shards: blocks of the o_proj and down_proj transforms; None: as few as make them quick (shards.py), mostly one.
    samples x seq_len tokens calibrate; each block trains for ``epochs`` over them.
    lr is AdamW's for transforms and diagonals; clips use ``lr * clip_lr_factor``.
    rotation: of the residual stream, merged into the weights first; learned: by ``rotation_steps`` steps of
    ``rotation_batch`` rows at rate ``rotation_lr`` (learned_rotation.py).
    transforms: which there are: qkv, o, gate_up, down (on-line, before these linears), k (on-line, on q and
    k, only if K is quantized) and v (merged into v_proj and o_proj). matrix: their form; v_matrix: v's, if it
    differs; v_each_head: one for each KV head, possible without the head-axis matrix of o. widest_factor: the right factors of
    qkv, gate_up and down are the largest up to it that the kernels take (None: left and right as equal as possible). diag: sites with a
    merged diagonal (that of o goes into v_proj); its start has exponent diag_alpha, and takes weights as they
    are or in units of their row's largest (diag_rows). Clips are learned or one
    number.
    chain: a block learns its full-precision output from full-precision inputs, or from those of the quantized
    blocks before it. precision: of float32 products in PyTorch's words; high is TF32. Folding and
    the factors of Hessians are float64.
    damping, damping_rule, column_order: of GPTQ's and Qronos's Hessian (``rounding.prepare``); None: as their
    authors have them. gptq_block: columns between two updates of all that follow. magr_alpha, magr_steps: of
    MagR (magr.py), none if 0. weight_scale, weight_shrink: how scales follow from weights (``weights.Grid``).
    distill_epochs: of the last, end-to-end stage (endtoend.py), none if 0; distill_lr is relative,
    distill_weight_lr in quantization steps (0: codes stay), distill_table_lr relative, of embedding and head (0: they
    stay), distill_batch_size rows a step (None: batch_size), distill_generated adds rows that the model writes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    system: str = Field(default="FlatQuant", pattern=ONE_LINE)
    paper: str = Field(default="arXiv 2410.09426", pattern=ONE_LINE)
    scheme: str = "w4a4"
    kv: Literal[4, 8, 16] = 16
    lm_head: Literal[8, 16] = 16
    group_size: int | None = Field(default=None, gt=0)
    rounding: Literal["rtn", "gptq", "qronos"] = "rtn"
    damping: float | None = Field(default=None, gt=0)
    damping_rule: Literal["mean", "spectral", "column"] | None = None
    column_order: Literal["natural", "norm"] = "natural"
    gptq_block: int = Field(default=128, gt=0)
    magr_alpha: float = Field(default=0.0, ge=0)
    magr_steps: int = Field(default=150, gt=0)
    weight_scale: Literal["max", "search"] = "max"
    weight_shrink: float = Field(default=1.0, gt=0, le=1)
    shards: Literal[1, 2, 4, 8] | None = None
    samples: int = Field(default=128, gt=0)
    seq_len: int = Field(default=2048, gt=1)
    epochs: int = Field(default=15, ge=0)
    batch_size: int = Field(default=4, gt=0)
    lr: float = Field(default=1e-2, gt=0)
    clip_lr_factor: float = Field(default=10.0, gt=0)
    rotation: Literal["none", "hadamard", "learned"] = "none"
    rotation_steps: int = Field(default=100, gt=0)
    rotation_batch: int = Field(default=8, gt=0)
    rotation_lr: float = Field(default=1.5, gt=0)
    matrix: Literal["svd", "direct", "orthogonal", "hadamard"] = "svd"
    transforms: tuple[TransformName, ...] = TRANSFORMS
    v_matrix: Literal["svd", "direct", "orthogonal", "hadamard", "affine"] | None = None
    v_each_head: bool = False
    widest_factor: int | None = Field(default=None, gt=1)
    diag: tuple[SiteName, ...] = DIAGONALS
    diag_alpha: float = Field(default=0.3, ge=0, le=1)
    diag_rows: Literal["raw", "normalized"] = "raw"
    weight_clip: bool = True
    activation_clip: Annotated[float, Field(gt=0, le=1)] | Literal["learned"] = "learned"
    kv_clip: Annotated[float, Field(gt=0, le=1)] | Literal["learned"] = "learned"
    chain: Literal["full", "quantized"] = "full"
    precision: Literal["highest", "high"] = "highest"
    distill_epochs: int = Field(default=0, ge=0)
    distill_lr: float = Field(default=3e-3, gt=0)
    distill_weight_lr: float = Field(default=1e-3, ge=0)
    distill_table_lr: float = Field(default=0.0, ge=0)
    distill_batch_size: int | None = Field(default=None, gt=0)
    distill_generated: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("*", mode="before")
    @classmethod
    def _word_or_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A word in any case is that word. YAML's ``yes`` is no number, though Python would count it as 1."""
        name = str(info.field_name)
        if isinstance(value, bool) and name != "diag" and cls.model_fields[name].annotation is not bool:
            raise ValueError("yes, no, true and false mean nothing here; give a number or a word")
        return value.lower() if isinstance(value, str) and name not in ("system", "paper") else value

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        if scheme not in SCHEMES:
            bits, cache, kv = scheme.partition("kv")
            if bits in SCHEMES and cache:
                raise ValueError(f"the KV cache has a setting of its own; use {bits}, and kv {kv or 4}")
            raise ValueError(f"unknown scheme; use one of {', '.join(SCHEMES)}")
        return scheme

    @field_validator("diag", mode="before")
    @classmethod
    def _all_or_none(cls, value: Any) -> Any:
        return DIAGONALS if value is True else () if value is False else value

    @field_validator("transforms", "diag")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in TRANSFORMS if name in value)

    @model_validator(mode="after")
    def _servable(self) -> "Recipe":
        if self.group_size is not None and self.activation_bits != 16:
            raise ValueError(
                f"group_size={self.group_size} is served only with 16-bit activations; "
                "use a scheme with a16 or drop the group size"
            )
        if self.v_each_head and "o" in self.transforms:
            raise ValueError(
                "v_each_head=True needs o_proj without a head-axis transform; leave o out of transforms"
            )
        return self

    @property
    def needs_hessian(self) -> bool:
        """Whether rounding reads the stream of the quantized prefix."""
        return self.rounding != "rtn" or self.magr_alpha > 0

    @property
    def damping_used(self) -> tuple[float, Literal["mean", "spectral", "column"]]:
        """Fraction and rule of the damping; by default those of the method's authors."""
        if self.rounding == "qronos":
            fraction, rule = (1e-6 if self.activation_bits == 16 else 1e-3), "spectral"
        else:
            fraction, rule = 0.01, "mean"
        return self.damping or fraction, self.damping_rule or rule  # type: ignore[return-value]

    @property
    def distill_rows(self) -> int:
        """Rows of a step of the last stage."""
        return self.distill_batch_size or self.batch_size

    @property
    def weight_bits(self) -> int:
        """Bits of a weight."""
        return SCHEMES[self.scheme][0]

    @property
    def activation_bits(self) -> int:
        """Bits of an activation."""
        return SCHEMES[self.scheme][1]

    @property
    def k_bits(self) -> int:
        """Bits of a cached key."""
        return self.kv

    @property
    def v_bits(self) -> int:
        """Bits of a cached value."""
        return self.kv

    @property
    def online(self) -> str:
        """What the run time does beyond an integer (or weight-only) linear layer, for people."""
        online = [name for name in self.transforms if name in ("qkv", "o", "gate_up", "down")]
        parts = ["transforms before " + ("every layer" if len(online) == 4 else ", ".join(online))]
        parts = parts if online else []
        if self.kv < 16:
            parts.append("on q and k")
        return ", ".join(parts) or "nothing"

    @property
    def follows_quantized(self) -> bool:
        """Whether a block needs what the quantized blocks before it give for every calibration row."""
        return self.needs_hessian or self.chain == "quantized"

    def to_yaml(self, calib: str | None = None) -> str:
        """The recipe as recipe.yaml holds it, with the name of the calibration text if given."""
        settings = self.model_dump(mode="json") | ({} if calib is None else {"calib": calib})
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML whose aliases stand for plain values and flat lists or mappings of them: what they stand for could
    otherwise double with every line, and be written out in a message or a comparison."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """PyYAML's, with a check of what an alias stands for."""
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and isinstance(node, yaml.CollectionNode):
            inner = [n for item in node.value for n in (item if isinstance(item, tuple) else (item,))]
            unfinished = node.end_mark is None  # the alias is inside what it stands for
            if unfinished or not all(isinstance(n, yaml.ScalarNode) for n in inner):
                raise yaml.YAMLError("an alias stands for nested values; write them out")
        return node


def load_yaml(file: Path) -> Any:
    """What a YAML file of settings holds. Raises one of ``YAML_ERRORS``."""
    loader = _Loader(file.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


YAML_ERRORS = (yaml.YAMLError, ValueError, OSError, RecursionError)
"""ValueError: bytes that are no text, and dates that do not exist."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        "samples": 16,
        "seq_len": 256,
        "epochs": 3,
        "rotation_steps": 10,
        "distill_epochs": 3,
        "distill_generated": 48,
    },
}
"""Named settings for ``--preset``. ``quick`` is reduced: for trying things out, not for accuracy."""


def make_recipe(**settings: Any) -> Recipe:
    """A checked recipe; UserError with one sentence if a setting is unknown or out of range."""
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # settings that do not go together: the sentence names them
            raise UserError(why) from None
        name = str(first["loc"][0])
        given = f"={settings.get(name)!r}"
        if first["type"] == "extra_forbidden":
            close = get_close_matches(name, Recipe.model_fields, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else "`flatquant recipes flatquant-w4a4` shows all"
            )
            raise UserError(f"{name}{given}: a recipe has no such setting; {hint}") from None
        if first["type"] == "tuple_type":
            why = "Input should be a list, such as [qkv, down], or [] for none"
        elif name.endswith("_clip") and len(first["loc"]) > 1:  # the first of several types
            why = "Input should be 'learned' or a number above 0, at most 1"
        raise UserError(f"{name}{given}: {why}") from None
