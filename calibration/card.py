"""The model card that goes into a checkpoint as README.md."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..spec import FlatQuantSpec
from .recipe import Recipe


def public_name(given: str | Path) -> str:
    """What to call a model or a text in public: the name of a file or folder, a hub name as it is."""
    return Path(given).resolve().name if Path(given).exists() else str(given)


def model_card(path: Path, named: str, spec: FlatQuantSpec, recipe: Recipe, calib: str) -> str:
    """Markdown with the hub's metadata block, for the model ``named`` whose folder is ``path``."""
    data = ModelCardData(
        base_model=named,
        base_model_relation="quantized",
        license=base_licence(path),
        library_name="vllm",
        tags=["flatquant", spec.scheme, "vllm"],
    )
    kv = "" if recipe.kv == 16 else f", {recipe.kv}-bit KV cache"
    return f"""---
{data.to_yaml()}
---

# {named}, {recipe.system} {spec.scheme.upper()}

Quantized by {spec.producer.name} {spec.producer.version} with {recipe.system} ({recipe.paper}): {recipe.weight_bits}-bit
weights, {recipe.activation_bits}-bit activations{kv}. Rounding: {recipe.rounding.upper()}. Calibrated on
{recipe.samples} x {recipe.seq_len} tokens of `{calib}`, {recipe.epochs} epochs, seed {recipe.seed}; `recipe.yaml` has
every setting and `calibration_log.jsonl` each block's error.

## Serve

```bash
pip install vllm vllm-flatquant
vllm serve <this folder or repository>
```

Without the vllm-flatquant plugin vLLM answers "Unknown quantization method: flatquant". Check a download with
`flatquant inspect <folder> --verify`. Tensor parallel sizes that divide {spec.shards} are served.
"""


def base_licence(path: Path) -> str | None:
    """The licence named in the base model's own card, if it has one."""
    card = path / "README.md"
    if not card.exists():
        return None
    try:
        return ModelCard.load(card).data.to_dict().get("license")
    except (ValueError, OSError, json.JSONDecodeError):
        return None
