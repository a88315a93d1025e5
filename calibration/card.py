"""The model card that goes into a checkpoint as README.md, in the hub's own format.

Written and read through ``huggingface_hub``'s card classes. What evaluations add stands in the metadata
(``model-index``), and the table in the text is drawn from there.
"""

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import first_line
from ..spec import FlatQuantSpec
from .errors import UserError
from .recipe import Recipe

LICENCE_KEYS = ("license", "license_name", "license_link")
"""What is carried over from the base model's card."""
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
"""Whose versions decide the numbers of a checkpoint."""
START, END = "<!-- results -->", "<!-- end of results -->"
NO_RESULTS = (
    "Not measured yet; `flatquant eval <folder> --protocol wikitext2 --text wiki.test.raw --original "
    "<base model> --update-card` fills this in."
)


def public_name(given: str | Path) -> str:
    """What to call a model or a text in public: the name of a file or folder, a hub name as it is."""
    return Path(given).resolve().name if Path(given).exists() else str(given)


def model_card(
    path: Path, named: str, spec: FlatQuantSpec, recipe: Recipe | None, calib: str, origin: str = ""
) -> str:
    """Markdown with the hub's metadata block, for the model ``named`` whose folder is ``path``.

    recipe: None for a converted checkpoint, of which ``origin`` then tells in a sentence where it comes
    from. calib: public name of the calibration text.
    """
    kv = "" if spec.kv.k_bits == spec.kv.v_bits == 16 else f"-kv{min(spec.kv.k_bits, spec.kv.v_bits)}"
    data = ModelCardData(
        base_model=named,
        base_model_relation="quantized",
        **base_licence(path),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["flatquant", f"{spec.scheme}{kv}", f"{spec.weights.bits}-bit", "quantized", "vllm"],
        model_name=f"{named.rpartition('/')[2]}-flatquant-{spec.scheme}{kv}",
    )
    text = _BODY.format(
        metadata=data.to_yaml(),
        title=f"{named}, {recipe.system if recipe else 'FlatQuant'} {spec.scheme.upper()}{kv.upper()}",
        numbers=_numbers(spec),
        system=f"{recipe.system} ({recipe.paper})" if recipe else "FlatQuant (arXiv 2410.09426)",
        producer=f"{spec.producer.name} {spec.producer.version}",
        made=_made(recipe, calib) if recipe else origin,
        results=f"{START}\n{NO_RESULTS}\n{END}",
        shards=spec.shards,
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
    )
    return str(ModelCard(text))


_BODY = """---
{metadata}
---

# {title}

{numbers}. Quantized with {system} by {producer}.

## Serve

With vLLM and the vllm-flatquant plugin in one environment:

```bash
vllm serve <this folder or repository>
```

Without the plugin vLLM answers "Unknown quantization method: flatquant". Check a download with
`flatquant inspect <folder> --verify`. It has {shards} tensor-parallel shard(s): `--tensor-parallel-size` must divide that.

## Accuracy

{results}

## How it was made

{made}

Versions: {versions}.
"""


def _numbers(spec: FlatQuantSpec) -> str:
    group = f"groups of {spec.weights.group_size}" if spec.weights.group_size else "one scale per output"
    activations = (
        "16-bit activations"
        if spec.activations.bits == 16
        else f"{spec.activations.bits}-bit activations per token"
    )
    cache = {16: "16-bit", 8: "8-bit", 4: "4-bit"}
    kv = f"{cache[spec.kv.k_bits]} keys and {cache[spec.kv.v_bits]} values in the KV cache"
    head = "" if spec.lm_head_bits == 16 else f", {spec.lm_head_bits}-bit lm_head"
    return f"{spec.weights.bits}-bit weights ({group}), {activations}, {kv}{head}"


def _made(recipe: Recipe, calib: str) -> str:
    blocks = f"{recipe.epochs} epochs for each block" if recipe.epochs else "no training block by block"
    last = f", then {recipe.distill_epochs} epochs end to end" if recipe.distill_epochs else ""
    return (
        f"Calibrated on {recipe.samples} x {recipe.seq_len} tokens of `{calib}`, {blocks}, "
        f"{recipe.rounding.upper()} rounding{last}, seed {recipe.seed}. `calibration_log.jsonl` has "
        f"each block's error, `recipe.yaml` the whole recipe:\n\n```yaml\n{recipe.to_yaml(calib)}```"
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, as installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def base_licence(path: Path) -> dict[str, Any]:
    """The licence keys of the base model's own card; empty if it has no card, or no licence in it."""
    card = path / "README.md"
    if not card.exists():
        return {}
    try:
        data = ModelCard.load(card).data.to_dict()
    except (ValueError, OSError, json.JSONDecodeError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in LICENCE_KEYS if isinstance(data.get(key), str)}


def load_card(folder: Path) -> ModelCard:
    """The card of a checkpoint folder; UserError if there is none, or none that can be read."""
    file = folder / "README.md"
    if not file.is_file():
        raise UserError(f"{folder} has no README.md; make the checkpoint again, or copy its model card")
    try:
        return ModelCard.load(file)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} is no model card ({first_line(error)}); copy it again") from None


def add_results(folder: Path, results: list[EvalResult]) -> None:
    """Put results into the folder's card: into its metadata, in place of any of the same data, metric and
    settings, and into the table. ``metric_args["unquantized"]`` of a result is the original's value.

    Raises UserError if there is no card, or it cannot be written.
    """
    card = load_card(folder)
    data: Any = card.data
    kept = [r for r in data.eval_results or [] if not any(_same(r, new) for new in results)]
    data.eval_results = [*kept, *results]
    if not data.model_name:
        data.model_name = folder.resolve().name
    before, start, rest = card.text.partition(START)
    _, end, after = rest.partition(END)
    table = f"{START}\n{results_table(data.eval_results)}\n{END}"
    if start and end:
        card.text = before + table + after
    else:
        card.text = f"{card.text.rstrip()}\n\n## Accuracy\n\n{table}\n"
    file = folder / "README.md"
    new = file.with_name(".README.md.new")
    try:
        new.write_text(str(card), encoding="utf-8")
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise UserError(
            f"{file} cannot be written ({error.strerror}); free space, or copy the checkpoint to a folder of yours"
        ) from None


def check_card(folder: Path) -> None:
    """UserError if ``add_results`` will not be able to write: said before hours of measuring, not after."""
    load_card(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder}/README.md cannot be written (Permission denied); leave out --update-card, or copy the checkpoint "
            "to a folder of yours"
        )


def _same(a: EvalResult, b: EvalResult) -> bool:
    """Whether two results answer the same question, whatever the answers."""

    def question(r: EvalResult) -> Any:
        args = {k: v for k, v in (r.metric_args or {}).items() if k != "unquantized"}
        return r.task_type, r.dataset_type, r.dataset_name, r.dataset_split, r.metric_name, args

    return question(a) == question(b)


def results_table(results: list[EvalResult]) -> str:
    """A Markdown table of results, the original beside."""
    lines = ["| data | metric | this checkpoint | unquantized |", "|---|---|---|---|"]
    for r in results:
        original = (r.metric_args or {}).get("unquantized")
        beside = "not measured" if original is None else f"{original:.4f}"
        lines.append(f"| {r.dataset_name} | {r.metric_name} | {r.metric_value:.4f} | {beside} |")
    return "\n".join(lines)
