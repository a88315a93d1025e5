"""Where FlatQuant sits in a model: checkpoint tensor names and the vLLM modules that take them.

vLLM fuses q/k/v and gate/up into one module each, and that module's input is a transform site.
"""

import re
from dataclasses import dataclass

from .spec import FlatQuantSpec


@dataclass(frozen=True)
class Site:
    """One kind of linear layer.

    name: the site's key in the spec and in tensor names. module: the vLLM module, from the block's
    sub-module on. parts: the checkpoint's modules, in the order in which vLLM stacks their rows.
    row_parallel: tensor parallelism splits the input, so the transform is split by shard.
    """

    name: str
    module: str
    parts: tuple[str, ...]
    row_parallel: bool


SITES = (
    Site("qkv", "self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), False),
    Site("o", "self_attn.o_proj", ("o_proj",), True),
    Site("gate_up", "mlp.gate_up_proj", ("gate_proj", "up_proj"), False),
    Site("down", "mlp.down_proj", ("down_proj",), True),
)

FACTOR_NAMES = {"transform_left": "left", "transform_right": "right", "transform_clip": "clip"}
"""Parameter of a linear module -> last part of its checkpoint name (the o site calls left ``head``)."""

WEIGHT_TENSORS = ("weight_packed", "weight_scale")
"""What each quantized part has instead of a weight."""

ATTENTION_NAMES = {
    "k_transform_matrix": "k_transform.matrix",
    "k_transform_inverse_t": "k_transform.inverse_t",
    "k_transform_clip": "k_transform.clip",
    "v_transform_clip": "v_transform.clip",
}
"""Parameter of an attention module -> checkpoint name below ``self_attn``."""


def site_of(prefix: str) -> Site | None:
    """The site of the vLLM module called ``prefix``; None if FlatQuant does not quantize such a module."""
    for site in SITES:
        if f".{prefix}".endswith(f".{site.module}"):
            return site
    return None


def checkpoint_name(prefix: str, tensor: str) -> str:
    """Name in the checkpoint of ``tensor`` (``q_proj.bias``) beside the vLLM module ``prefix``."""
    return f"{prefix.rpartition('.')[0]}.{tensor}"


def factor_name(site: Site, parameter: str) -> str:
    """Name in the checkpoint, below the block's sub-module, of a linear module's transform parameter."""
    last = FACTOR_NAMES[parameter]
    return f"{site.name}_transform.{'head' if (site.name, last) == ('o', 'left') else last}"


def site_shapes(spec: FlatQuantSpec, site: Site) -> dict[str, tuple[int, ...]]:
    """The transform parameters that a linear module of ``site`` has, with the checkpoint's whole shapes."""
    shards, sizes = spec.shards if site.row_parallel else 1, getattr(spec.sites, site.name)
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(sizes, int):
        shapes["transform_left"] = (shards, sizes, sizes)
    elif sizes is not None:
        shapes["transform_left"] = (shards, sizes.left, sizes.left)
        shapes["transform_right"] = (shards, sizes.right, sizes.right)
    if spec.activations.bits < 16:
        shapes["transform_clip"] = (shards,)
    return shapes


def attention_shapes(spec: FlatQuantSpec) -> dict[str, tuple[int, ...]]:
    """The parameters that an attention module has for its KV cache, with their shapes."""
    clips: dict[int, tuple[int, ...]] = {8: (1,), 4: (2,)}
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.sites.k is not None:
        square = (spec.sites.k, spec.sites.k)
        shapes |= {"k_transform_matrix": square, "k_transform_inverse_t": square}
        shapes["k_transform_clip"] = clips[spec.kv.k_bits]
    if spec.kv.v_bits < 16:
        shapes["v_transform_clip"] = clips[spec.kv.v_bits]
    return shapes


def ignored_parts(spec: FlatQuantSpec, prefix: str) -> list[str]:
    """The checkpoint's parts of the module ``prefix`` that ``ignore`` names, itself or by a parent."""
    site = site_of(prefix)
    parts = site.parts if site is not None else (prefix.rpartition(".")[2],)
    names = {part: checkpoint_name(prefix, part).removeprefix(".") for part in parts}
    return [
        part
        for part, name in names.items()
        if any(f"{name}.".startswith(f"{skip}.") for skip in spec.ignore)
    ]


def block_tensors(
    spec: FlatQuantSpec, block: str, sizes: dict[str, tuple[int, int]] | None = None
) -> dict[str, tuple[int, ...] | None]:
    """The tensors, biases aside, that the quantized modules of ``block`` (a prefix) must have.

    sizes: (outputs, inputs) of each part. Returns name -> shape; None for weights where sizes is None.
    """
    tensors: dict[str, tuple[int, ...] | None] = {}
    for site in SITES:
        prefix = f"{block}.{site.module}"
        if ignored_parts(spec, prefix):
            continue
        for part in site.parts:
            packed, scale = (checkpoint_name(prefix, f"{part}.{kind}") for kind in WEIGHT_TENSORS)
            tensors[packed] = tensors[scale] = None
            if sizes is not None:
                outputs, inputs = sizes[part]
                tensors[packed] = (outputs, inputs // 2)
                tensors[scale] = (outputs, inputs // (spec.weights.group_size or inputs))
        for parameter, shape in site_shapes(spec, site).items():
            tensors[checkpoint_name(prefix, factor_name(site, parameter))] = shape
    for parameter, shape in attention_shapes(spec).items():
        tensors[f"{block}.self_attn.{ATTENTION_NAMES[parameter]}"] = shape
    return tensors


def rename_rules() -> dict[re.Pattern[str], str]:
    """Regular expressions from checkpoint names to parameter names.

    vLLM applies them at two nesting levels, so they do not match their own results, and need no
    ``model.`` in front.
    """
    rules: dict[re.Pattern[str], str] = {}
    for site in SITES:
        parent, _, module = site.module.partition(".")
        for parameter in FACTOR_NAMES:
            old = re.escape(f".{parent}.{factor_name(site, parameter)}")
            rules[re.compile(old + "$")] = f".{parent}.{module}.{parameter}"
    for parameter, name in ATTENTION_NAMES.items():
        rules[re.compile(re.escape(f".self_attn.{name}") + "$")] = f".self_attn.attn.{parameter}"
    return rules
