"""Named recipes: published systems as settings of one pipeline, and how a name or a YAML file becomes one.

``flatquant recipes`` lists them, docs/recipes.md explains them. A system is added by adding an entry.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import UserError
from .recipe import PRESETS, YAML_ERRORS, Recipe, load_yaml, make_recipe

DEFAULT = "flatquant-w4a4"
"""What ``flatquant quantize`` does if no recipe is asked for."""


@dataclass(frozen=True)
class NamedRecipe:
    """One entry of the registry.

    summary: what it learns and when to choose it, one line. settings: fields of ``Recipe`` that differ from
    their defaults; ``system`` and ``paper`` are among them.
    """

    summary: str
    settings: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        """The entry as a checked recipe."""
        return make_recipe(**self.settings)


FLATQUANT: dict[str, NamedRecipe] = {
    "flatquant-w4a4": NamedRecipe("learned Kronecker transforms and clips; the default"),
    "flatquant-w4a4-gptq": NamedRecipe(
        "as flatquant-w4a4, then GPTQ; the better one with enough calibration text", {"rounding": "gptq"}
    ),
    "flatquant-w4a4kv4": NamedRecipe("as flatquant-w4a4 with a 4-bit KV cache", {"kv": 4}),
    "flatquant-w4a4kv4-gptq": NamedRecipe(
        "as flatquant-w4a4-gptq with a 4-bit KV cache", {"kv": 4, "rounding": "gptq"}
    ),
    "flatquant-w4a4kv8": NamedRecipe("as flatquant-w4a4 with an 8-bit KV cache", {"kv": 8}),
    "flatquant-w4a8": NamedRecipe(
        "8-bit activations: as fast as w4a4 where the GPU multiplies int8, and more accurate",
        {"scheme": "w4a8"},
    ),
    "flatquant-w4a8-gptq": NamedRecipe(
        "as flatquant-w4a8, then GPTQ", {"scheme": "w4a8", "rounding": "gptq"}
    ),
    "flatquant-w4a16": NamedRecipe(
        "weights only, for GPUs that do not multiply int8 fast", {"scheme": "w4a16"}
    ),
    "flatquant-w4a16-gptq": NamedRecipe(
        "as flatquant-w4a16, then GPTQ", {"scheme": "w4a16", "rounding": "gptq"}
    ),
    "flatquant-w4a16-g128-gptq": NamedRecipe(
        "as flatquant-w4a16-gptq with a scale for every 128 weights",
        {"scheme": "w4a16", "rounding": "gptq", "group_size": 128},
    ),
}

WIDE_SETTINGS: dict[str, Any] = {
    "diag_rows": "normalized",
    "widest_factor": 128,
    "precision": "high",
}
WIDE: dict[str, NamedRecipe] = {
    "flatquant-wide-w4a4": NamedRecipe(
        "as flatquant-w4a4-gptq with larger transforms: more accurate, a little slower to serve",
        {**WIDE_SETTINGS, "rounding": "gptq"},
    ),
    "flatquant-wide-w4a4kv4": NamedRecipe(
        "as flatquant-wide-w4a4 with a 4-bit KV cache", {**WIDE_SETTINGS, "rounding": "gptq", "kv": 4}
    ),
    "flatquant-wide-w4a8": NamedRecipe(
        "as flatquant-wide-w4a4 with 8-bit activations",
        {**WIDE_SETTINGS, "rounding": "gptq", "scheme": "w4a8"},
    ),
    "flatquant-wide-w4a16": NamedRecipe(
        "as flatquant-w4a16 with larger transforms: more accurate", {**WIDE_SETTINGS, "scheme": "w4a16"}
    ),
}

LAST_STAGE: dict[str, Any] = {
    "distill_epochs": 8,
    "distill_generated": 2048,
    "distill_batch_size": 8,
    "distill_lr": 1e-3,
    "distill_weight_lr": 3e-3,
}
END_TO_ENDS: dict[str, NamedRecipe] = {
    name.replace("wide", "e2e"): NamedRecipe(
        f"as {name}, then all of it trained on the logits (the whole model in memory)",
        {**recipe.settings, **LAST_STAGE},
    )
    for name, recipe in WIDE.items()
}

QUAROT_SETTINGS: dict[str, Any] = {
    "system": "QuaRot",
    "paper": "arXiv 2404.00456",
    "rotation": "hadamard",
    "transforms": ["o", "down", "k", "v"],
    "matrix": "hadamard",
    "diag": False,
    "weight_clip": False,
    "weight_scale": "search",
    "activation_clip": 0.9,
    "kv_clip": 0.95,
    "epochs": 0,
    "rounding": "gptq",
}
SPINQUANT_SETTINGS: dict[str, Any] = {
    **QUAROT_SETTINGS,
    "system": "SpinQuant",
    "paper": "arXiv 2405.16406",
    "rotation": "learned",
    "transforms": ["down", "k"],
    "activation_clip": 1.0,
    "kv_clip": 1.0,
}
ROTATIONS: dict[str, NamedRecipe] = {
    "quarot-w4a4": NamedRecipe("Hadamard rotations and GPTQ, nothing trained; minutes", QUAROT_SETTINGS),
    "quarot-w4a4-rtn": NamedRecipe(
        "as quarot-w4a4 without GPTQ; seconds for each block", {**QUAROT_SETTINGS, "rounding": "rtn"}
    ),
    "quarot-w4a4kv4": NamedRecipe("as quarot-w4a4 with a 4-bit KV cache", {**QUAROT_SETTINGS, "kv": 4}),
    "spinquant-w4a4": NamedRecipe(
        "rotations learned end to end (the whole model in memory), then GPTQ", SPINQUANT_SETTINGS
    ),
    "spinquant-w4a4kv4": NamedRecipe(
        "as spinquant-w4a4 with a 4-bit KV cache", {**SPINQUANT_SETTINGS, "kv": 4}
    ),
}

OMNIQUANT_SETTINGS: dict[str, Any] = {
    "system": "OmniQuant",
    "paper": "arXiv 2308.13137",
    "transforms": [],
    "diag": ["qkv", "o", "gate_up"],
    "diag_alpha": 0.5,
    "activation_clip": 1.0,
    "kv_clip": 1.0,
    "chain": "quantized",
    "epochs": 20,
    "batch_size": 1,
    "lr": 5e-3,
    "clip_lr_factor": 2.0,
}
SCALINGS: dict[str, NamedRecipe] = {
    "omniquant-w4a4": NamedRecipe(
        "learned diagonals and weight clips; no on-line cost, far behind rotations where there are outliers",
        OMNIQUANT_SETTINGS,
    ),
    "omniquant-w4a16": NamedRecipe(
        "learned diagonals and weight clips for weights only; no on-line cost",
        {**OMNIQUANT_SETTINGS, "scheme": "w4a16"},
    ),
    "affinequant-w4a4": NamedRecipe(
        "as omniquant-w4a4, with a full matrix for each value head that opens from its diagonal",
        {
            **OMNIQUANT_SETTINGS,
            "system": "AffineQuant",
            "paper": "arXiv 2403.12544",
            "transforms": ["v"],
            "v_matrix": "affine",
            "v_each_head": True,
        },
    ),
}

PLAIN: dict[str, Any] = {
    "transforms": [],
    "diag": False,
    "weight_clip": False,
    "activation_clip": 1.0,
    "epochs": 0,
}
"""Nothing on-line and nothing learned: what methods that only round, or only rescale, start from."""
SMOOTHQUANT_SETTINGS: dict[str, Any] = {
    **PLAIN,
    "system": "SmoothQuant",
    "paper": "arXiv 2211.10438",
    "diag": ["qkv", "gate_up"],
    "diag_alpha": 0.85,
}
GPTQ_SETTINGS: dict[str, Any] = {
    **PLAIN,
    "system": "GPTQ",
    "paper": "arXiv 2210.17323",
    "rounding": "gptq",
    "column_order": "norm",
    "weight_scale": "search",
}
QRONOS_SETTINGS: dict[str, Any] = {
    **GPTQ_SETTINGS,
    "system": "Qronos",
    "paper": "arXiv 2505.11695",
    "rounding": "qronos",
}
MAGR_SETTINGS: dict[str, Any] = {
    **GPTQ_SETTINGS,
    "system": "MagR",
    "paper": "arXiv 2406.00800",
    "weight_scale": "max",
    "magr_alpha": 1e-3,
}
ROUNDINGS: dict[str, NamedRecipe] = {
    "smoothquant-w8a8": NamedRecipe(
        "outliers moved from activations to weights; 8-bit weights",
        {**SMOOTHQUANT_SETTINGS, "scheme": "w8a8"},
    ),
    "smoothquant-w4a8": NamedRecipe(
        "as smoothquant-w8a8 with 4-bit weights", {**SMOOTHQUANT_SETTINGS, "scheme": "w4a8"}
    ),
    "gptq-w4a16": NamedRecipe(
        "weights only, error feedback, no transform; the usual baseline",
        {**GPTQ_SETTINGS, "scheme": "w4a16"},
    ),
    "gptq-w4a16-g128": NamedRecipe(
        "as gptq-w4a16 with a scale for every 128 weights",
        {**GPTQ_SETTINGS, "scheme": "w4a16", "group_size": 128},
    ),
    "gptq-w3a16": NamedRecipe("as gptq-w4a16 with 3-bit weights", {**GPTQ_SETTINGS, "scheme": "w3a16"}),
    "qronos-w4a16": NamedRecipe(
        "as gptq-w4a16, and corrects the error of the layers before",
        {**QRONOS_SETTINGS, "scheme": "w4a16"},
    ),
    "qronos-w3a16": NamedRecipe(
        "as qronos-w4a16 with 3-bit weights", {**QRONOS_SETTINGS, "scheme": "w3a16"}
    ),
    "qronos-w4a4": NamedRecipe(
        "QuaRot's rotations, rounded by Qronos; nothing trained",
        {
            **QUAROT_SETTINGS,
            **{k: QRONOS_SETTINGS[k] for k in ("system", "paper", "rounding", "column_order")},
        },
    ),
    "magr-w3a16": NamedRecipe(
        "3-bit weights: their range shrunk first, then GPTQ",
        {**MAGR_SETTINGS, "scheme": "w3a16", "weight_shrink": 0.9},
    ),
    "magr-w2a16": NamedRecipe(
        "as magr-w3a16 with 2-bit weights; too few for the small models measured",
        {**MAGR_SETTINGS, "scheme": "w2a16", "weight_shrink": 0.8},
    ),
}

RECIPES: dict[str, NamedRecipe] = {
    **FLATQUANT,
    **WIDE,
    **END_TO_ENDS,
    **ROTATIONS,
    **SCALINGS,
    **ROUNDINGS,
}
"""Name -> recipe, in the order in which they are listed."""


@dataclass(frozen=True)
class Chosen:
    """A recipe, the registry name it is based on, and the calibration text that its file names, if any.

    base_named: whether ``base`` was asked for, or is what a file that names none is filled up from.
    """

    recipe: Recipe
    base: str
    calib: str | None = None
    base_named: bool = True

    def check_calib(self, name: str) -> None:
        """UserError if the text file that recipe ``name`` calls for is not here: a checkpoint's recipe.yaml keeps
        no folders."""
        file = Path(self.calib or "")
        if file.suffix in (".txt", ".jsonl", ".npy") and not file.is_file():
            raise UserError(
                f"{name} calibrates on {self.calib}, which is not in the working directory; say where it is with --calib"
            )


def preset_settings(preset: str, recipe: str) -> dict[str, Any]:
    """What ``--preset`` changes in a recipe (a name or a file): one that trains nothing keeps its 0 epochs, one
    without a last stage or whose model writes no rows none of these."""
    chosen = choose_recipe(recipe).recipe
    kept = [
        name for name in ("epochs", "distill_epochs", "distill_generated") if not getattr(chosen, name)
    ]
    return {name: value for name, value in PRESETS[preset].items() if name not in kept}


def choose_recipe(name: str = DEFAULT, **overrides: Any) -> Chosen:
    """The recipe called ``name``, or of the YAML file ``name``, with ``overrides`` in place of its settings.

    A file holds settings of ``Recipe``, and may name a registry entry under ``base`` whose settings it
    changes, and a calibration text under ``calib``. A checkpoint's recipe.yaml is such a file. Raises
    UserError naming what is unknown, with what comes close.
    """
    settings, base, calib, named = {}, name, None, True
    if name.lower() in RECIPES:
        base = name.lower()
    else:
        settings = _read(name)
        named = "base" in settings
        base = settings.pop("base", DEFAULT)
        calib = settings.pop("calib", None)
        if str(base).lower() not in RECIPES:
            raise UserError(f"{name}: base: {_unknown(str(base))}")
        base = base.lower()
        if calib is not None and not isinstance(calib, str):
            raise UserError(f"{name}: calib must be the name of a text, not {calib!r}")
    try:
        recipe = make_recipe(**{**RECIPES[base].settings, **settings, **overrides})
    except UserError as error:
        in_file = str(error).partition("=")[0] in settings.keys() - overrides.keys()
        raise UserError(f"{name}: {error}" if in_file else str(error)) from None
    return Chosen(recipe, base, calib, named)


def _unknown(name: str) -> str:
    word = name.lower()
    # A system or a scheme alone is the beginning or a part of many; otherwise it is mistyped.
    parts = sorted((r for r in RECIPES if word in r), key=lambda r: not r.startswith(word))
    close = parts[:3] if len(word) > 2 and parts else get_close_matches(word, RECIPES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"there is no recipe '{name}'; {hint}`flatquant recipes` lists them"


def _read(name: str) -> dict[str, Any]:
    """The settings of a YAML file; UserError if there is none, or it holds something else."""
    file = Path(name)
    if not file.is_file():
        if file.is_dir() and file.name:
            raise UserError(f"{name} is a folder; give its recipe.yaml, or another file or a name")
        if file.suffix in (".yaml", ".yml") or file.name != name:
            raise UserError(f"recipe file {name} does not exist; give a file or a name")
        raise UserError(_unknown(name))
    try:
        settings = load_yaml(file)
    except YAML_ERRORS as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"recipe file {name} is not YAML ({why}); write one `key: value` a line"
        ) from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(
            f"recipe file {name} holds no settings; write one `key: value` a line, such as `epochs: 5`"
        )
    return settings
