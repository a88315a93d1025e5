"""Where FlatQuant sits in a model: checkpoint tensor names and the vLLM modules that take them.

vLLM fuses q/k/v and gate/up into one module each, and that module's input is a transform site.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import CheckpointError, UnsupportedError
from .kernels.pack import packed_shape
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

SITE_NAMES = tuple(site.name for site in SITES)

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


def factor_shapes(
    spec: FlatQuantSpec, site: Site, layer: str, inputs: int
) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the transform parameters of ``layer``, which has ``inputs`` inputs over all ranks.

    Returns parameter -> shape, leaving out those that the checkpoint does not have. Raises
    CheckpointError if the spec's sizes do not fit.
    """
    shapes = site_shapes(spec, site)
    shards = spec.shards if site.row_parallel else 1
    left, right = (shapes.get(name, (0, 1))[1] for name in ("transform_left", "transform_right"))
    # The o site's second factor is the identity on head_dim, whatever that is.
    exact = site.name != "o" and "transform_left" in shapes
    if inputs % (shards * left * right) or (exact and inputs != shards * left * right):
        sizes = getattr(spec.sites, site.name)
        raise CheckpointError(
            f"{layer} has {inputs} inputs, which quantization_config (shards={shards}, "
            f"sites.{site.name}={sizes}) does not fit; config.json was changed, quantize the model again"
        )
    return shapes


def check_head_dim(spec: FlatQuantSpec, head_dim: int, layer: str = "the model") -> None:
    """Raise CheckpointError if K's transform is not of ``head_dim``."""
    if spec.sites.k not in (None, head_dim):
        raise CheckpointError(
            f"{layer} has head_dim {head_dim} but quantization_config.sites.k is {spec.sites.k}; "
            "config.json was changed, quantize the model again"
        )


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


def is_quantized(spec: FlatQuantSpec, prefix: str) -> bool:
    """Whether the module ``prefix``, which has a site, is quantized: ``ignore`` names none of its parts.

    Raises UnsupportedError if it names some and not all, since one input is transformed for all.
    """
    site = site_of(prefix)
    ignored = ignored_parts(spec, prefix)
    if site is None or not ignored:
        return site is not None
    if len(ignored) < len(site.parts):
        raise UnsupportedError(
            f"quantization_config.ignore lists {', '.join(ignored)} but not all of "
            f"{', '.join(site.parts)} of {prefix}, which vLLM fuses into one layer; "
            "quantize again with all or none of them ignored"
        )
    return False


def block_tensors(
    spec: FlatQuantSpec, block: str, sizes: dict[str, tuple[int, int]] | None = None
) -> dict[str, tuple[int, ...] | None]:
    """The tensors, biases aside, that the quantized modules of ``block`` (a prefix) must have.

    sizes: (outputs, inputs) of each part. Returns name -> shape; None for weights where sizes is None.
    Raises UnsupportedError if ``ignore`` names a part of a fused module only, CheckpointError if the spec's
    sizes do not fit ``sizes``.
    """
    tensors: dict[str, tuple[int, ...] | None] = {}
    for site in SITES:
        prefix = f"{block}.{site.module}"
        if not is_quantized(spec, prefix):
            continue
        for part in site.parts:
            packed, scale = (checkpoint_name(prefix, f"{part}.{kind}") for kind in WEIGHT_TENSORS)
            tensors[packed] = tensors[scale] = None
            if sizes is not None:
                outputs, inputs = sizes[part]
                group = spec.weights.group_size or inputs
                if inputs % group:
                    raise CheckpointError(
                        f"{packed} has {inputs} columns, not a multiple of weights.group_size {group}; "
                        "config.json was changed, quantize the model again"
                    )
                tensors[packed] = packed_shape(outputs, inputs, spec.weights.bits)
                tensors[scale] = (outputs, inputs // group)
        if sizes is None:
            factors = site_shapes(spec, site)
        else:
            factors = factor_shapes(spec, site, prefix, sizes[site.parts[0]][1])
        for parameter, shape in factors.items():
            tensors[checkpoint_name(prefix, factor_name(site, parameter))] = shape
    for parameter, shape in attention_shapes(spec).items():
        tensors[f"{block}.self_attn.{ATTENTION_NAMES[parameter]}"] = shape
    return tensors


def checkpoint_shapes(
    spec: FlatQuantSpec, model: Mapping[str, tuple[int, ...]], blocks: str = "model.layers"
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint.

    model: the same of the unquantized model. blocks: the prefix of its decoder blocks. Raises as
    ``block_tensors``.
    """
    shapes = dict(model)
    first = len(blocks.split("."))
    numbers = {name.split(".")[first] for name in model if name.startswith(f"{blocks}.")}
    for block in (f"{blocks}.{number}" for number in numbers):
        sizes: dict[str, tuple[int, int]] = {}
        for site in SITES:
            prefix = f"{block}.{site.module}"
            if is_quantized(spec, prefix):
                for part in site.parts:
                    name = checkpoint_name(prefix, f"{part}.weight")
                    if name not in shapes:
                        raise UnsupportedError(
                            f"the model of config.json has no {name}, so it is none that FlatQuant serves; "
                            "use a supported model (Llama, Mistral, Qwen2, Qwen3)"
                        )
                    outputs, inputs = shapes.pop(name)
                    sizes[part] = (outputs, inputs)
        tensors = block_tensors(spec, block, sizes)
        shapes |= {name: shape for name, shape in tensors.items() if shape is not None}
    if spec.lm_head_bits < 16:
        if "lm_head.weight" not in shapes:
            raise CheckpointError(
                "quantization_config has lm_head_bits=8 but config.json ties lm_head to the embedding; "
                "config.json was changed, quantize the model again"
            )
        rows, columns = shapes.pop("lm_head.weight")
        shapes |= {"lm_head.weight_packed": (rows, columns), "lm_head.weight_scale": (rows, 1)}
    return shapes


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
