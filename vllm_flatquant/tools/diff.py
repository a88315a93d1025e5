"""``flatquant diff``: what differs between two checkpoints."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from torch import Tensor

from ..calibration.errors import UserError
from ..calibration.recipe import YAML_ERRORS, load_yaml
from ..calibration.reference import read_spec
from ..calibration.source import WeightFiles, folder_file, read_config, resolve_folder
from ..files import first_line
from ..kernels.pack import unpack_codes
from ..spec import FlatQuantSpec

Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> (first's value, second's value); None for a key that is not there."""


def diff_folders(first: str, second: str) -> dict[str, Any]:
    """Compare two checkpoint (or unquantized model) folders. Raises UserError if one cannot be read.

    Returns ``same``, ``config`` and ``recipe`` (dotted key -> the two values, where they differ),
    ``results`` (of both cards, differing or not), and ``tensors`` with ``only_first``, ``only_second``,
    ``shape`` (name -> two "dtype [shape]"), ``values`` (name -> max_difference, changed: share of its
    elements, of its codes if the tensor holds codes) and ``equal`` (how many). ``same`` looks at
    configuration, recipe and tensors, not at results.
    """
    a, b = resolve_folder(first), resolve_folder(second)
    specs = read_spec(a), read_spec(b)
    found: dict[str, Any] = {
        "first": str(a),
        "second": str(b),
        "config": changes(_flat(read_config(a)), _flat(read_config(b))),
        "recipe": changes(_flat(_recipe(a)), _flat(_recipe(b))),
        "tensors": diff_tensors(WeightFiles(a), WeightFiles(b), specs),
        "results": _both(_results(a), _results(b)),
    }
    tensors = found["tensors"]
    found["same"] = not (
        found["config"] or found["recipe"] or any(v for k, v in tensors.items() if k != "equal")
    )
    return found


def diff_tensors(
    a: WeightFiles, b: WeightFiles, specs: tuple[FlatQuantSpec | None, FlatQuantSpec | None]
) -> dict[str, Any]:
    """The ``tensors`` part of ``diff_folders``, one pair in memory at a time."""
    names, others = set(a.names), set(b.names)
    found: dict[str, Any] = {
        "only_first": sorted(names - others),
        "only_second": sorted(others - names),
        "shape": {},
        "values": {},
        "equal": 0,
    }
    for name in sorted(names & others):
        kinds = [f"{files.stored[name].dtype} {list(files.stored[name].shape)}" for files in (a, b)]
        if kinds[0] != kinds[1]:
            found["shape"][name] = kinds
            continue
        x, y = a.tensor(name, check=False), b.tensor(name, check=False)
        packed = name.endswith("weight_packed") and not name.startswith("lm_head.")  # that one is int8
        if packed and specs[0] and specs[1]:
            x, y = (
                unpack_codes(t, spec.weights.bits) for t, spec in zip((x, y), specs, strict=True) if spec
            )
        difference = compare(x, y)
        if difference is None:
            found["equal"] += 1
        else:
            found["values"][name] = difference
    return found


def compare(x: Tensor, y: Tensor) -> dict[str, float] | None:
    """Largest absolute difference, and the share of elements that differ; None if equal (NaN equals NaN)."""
    if x.shape != y.shape:
        return {"max_difference": float("inf"), "changed": 1.0}
    changed = (x != y) & ~(x.isnan() & y.isnan()) if x.is_floating_point() else x != y
    if not bool(changed.any()):
        return None
    largest = (x[changed].double() - y[changed].double()).abs().nan_to_num(nan=float("inf")).max()
    return {"max_difference": float(largest), "changed": float(changed.double().mean())}


def changes(a: dict[str, Any], b: dict[str, Any]) -> Changes:
    """The keys on which two flat mappings differ."""
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        full: inner
        for key, nested in value.items()
        for full, inner in _flat(nested, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _recipe(folder: Path) -> dict[str, Any]:
    """recipe.yaml, {} if there is none."""
    file = folder_file(folder, "recipe.yaml")
    if not file.is_file():
        return {}
    try:
        recipe = load_yaml(file)
    except YAML_ERRORS as error:
        raise UserError(f"{file} is no YAML ({first_line(error)}); copy it again") from None
    return recipe if isinstance(recipe, dict) else {"recipe": recipe}


def _results(folder: Path) -> dict[str, float]:
    """What the folder's card records: "data, metric" -> value; {} without a readable card."""
    file = folder_file(folder, "README.md")
    if not file.is_file():
        return {}
    try:
        found: Any = ModelCard.load(file).data.eval_results or []
    except (ValueError, OSError, yaml.YAMLError):
        return {}
    return {f"{r.dataset_name}, {r.metric_name}": r.metric_value for r in found}


def _both(a: dict[str, float], b: dict[str, float]) -> Changes:
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b})}


def over_blocks(
    tensors: Iterable[tuple[str, Any]], alike: Callable[[Any], Any] = lambda value: None
) -> list[tuple[str, list[Any]]]:
    """Names and values, with those of the same tensor of several blocks in one, ``model.layers.0-4,7.x``, if
    ``alike`` gives the same for their values."""
    groups: dict[tuple[str, str, Any], list[tuple[int, Any]]] = {}
    for name, value in tensors:
        head, number, tail = _BLOCK.match(name).groups()  # type: ignore[union-attr]
        groups.setdefault((head, tail, alike(value)), []).append((int(number or -1), value))
    return [
        (
            f"{head}{'' if found[0][0] < 0 else _ranges(sorted(n for n, _ in found))}{tail}",
            [v for _, v in found],
        )
        for (head, tail, _), found in groups.items()
    ]


_BLOCK = re.compile(r"(?s)(.*?\.layers\.(?=[0-9]{1,9}\.)|)([0-9]{1,9}(?=\.)|)(.*)")
"""What stands before a block's number, the number, and the rest; all of a name that has none is the rest."""


def _ranges(numbers: list[int]) -> str:
    """``0-4,7`` of ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def diff_lines(found: dict[str, Any]) -> list[str]:
    """``diff_folders``'s result for people."""
    tensors = found["tensors"]
    lines = [f"- {found['first']}", f"+ {found['second']}"]
    for part in ("config", "recipe"):
        lines += [f"{part} {key}: {a!r} -> {b!r}" for key, (a, b) in found[part].items()]
    for place in ("first", "second"):
        missing = [(name, "") for name in tensors[f"only_{place}"]]
        lines += [f"tensor only in the {place}: {name}" for name, _ in over_blocks(missing)]
    shapes = [(name, f"{a} -> {b}") for name, (a, b) in tensors["shape"].items()]
    lines += [f"tensor {name}: {kinds[0]}" for name, kinds in over_blocks(shapes, lambda kinds: kinds)]
    for name, values in over_blocks(tensors["values"].items()):
        what = "codes" if name.endswith("weight_packed") else "values"
        changed = [f"{100 * share:.2f}%" for share in sorted(value["changed"] for value in values)]
        shares = " to ".join(dict.fromkeys((changed[0], changed[-1])))
        largest = max(value["max_difference"] for value in values)
        lines.append(f"tensor {name}: {shares} of the {what} differ, by at most {largest:.3g}")
    lines.append(f"{tensors['equal']} tensors equal, {len(tensors['values'])} of other values")
    for key, (a, b) in found["results"].items():
        lines.append(
            f"{key}: {'not measured' if a is None else a} / {'not measured' if b is None else b}"
        )
    if found["same"]:
        lines.append("the same checkpoint")
    return lines
