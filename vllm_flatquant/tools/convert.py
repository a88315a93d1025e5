"""``flatquant convert``: folders of other FlatQuant tools become checkpoints of ours."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..calibration.card import model_card
from ..calibration.errors import UserError
from ..calibration.export import write_checkpoint
from ..calibration.golden import GOLDEN_TOKENS, GOLDEN_TOP
from ..calibration.reference import load_reference
from ..calibration.source import GOLDEN, WeightFiles, check_weights, load_config, read_config
from ..calibration.staging import check_out
from ..spec import foreign_tool
from .foreign import ForeignModel
from .foreign_official import read_matrices, read_realquant
from .foreign_vllm import ASCEND, read_ascend, read_squeezebits

_FACTOR = re.compile(r"\.(qkv|o|gate_up|down)_transform\.(left|right|head)$")
FORMATS = (
    "flat_matrices.pth of the official code with --model, its RealQuant folders, SqueezeBits W4A16 folders "
    f"and vllm-ascend {ASCEND} folders"
)


def convert(
    source: str,
    out: str | Path,
    model: str | None = None,
    scheme: str | None = None,
    kv: int | None = None,
    overwrite: bool = False,
    golden: bool = True,
) -> list[str]:
    """Write ``source`` as a checkpoint to ``out``.

    model: the original model's folder, for what comes without weights or config.json. scheme, kv: what the
    source does not record. golden: run the model to add a self-test (it must fit into memory).
    Returns what was approximated, in sentences. Raises UserError for a source that is none of ``FORMATS``,
    or holds what ours cannot, and leaves nothing half-written.
    """
    out = Path(out).resolve()
    original = [Path(model)] if model and Path(model).exists() else []
    check_out(out, overwrite, Path(source), *original)
    found = read_foreign(Path(source), model, scheme.lower() if scheme else None, kv)

    def finish(folder: Path) -> None:
        (folder / "README.md").write_text(_card(found), encoding="utf-8")
        try:
            check_weights(folder, load_config(folder), WeightFiles(folder), found.spec)
            if golden:
                save_file(golden_tensors(folder), folder / GOLDEN)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), f"{source}, converted,")) from None

    write_checkpoint(out, overwrite, on_grid(found), found.side, found.config, found.spec, finish)
    return found.notes


def on_grid(found: ForeignModel) -> Iterator[dict[str, Tensor]]:
    """``found.tensors`` with on-line factors rounded to ``transform_dtype``, as kernels read them, and a note
    if that changed one: the weights were made for the finer one, so it is an approximation."""
    grid, worst = getattr(torch, found.spec.transform_dtype), 0.0
    for part in found.tensors:
        for name in filter(_FACTOR.search, part):
            exact, part[name] = part[name].float(), part[name].to(grid).float()
            worst = max(worst, ((part[name] - exact).abs().max() / exact.abs().max()).item())
        yield part
    if worst > 0:
        found.notes.append(
            f"transforms were finer than {found.spec.transform_dtype} and rounded to it, by up to {worst:.1e} of the "
            "largest element"
        )


def read_foreign(path: Path, model: str | None, scheme: str | None, kv: int | None) -> ForeignModel:
    """Recognise a folder or file and open it. Raises UserError."""
    matrices = path / "flat_matrices.pth" if path.is_dir() else path
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a folder or flat_matrices.pth of another FlatQuant tool"
        )
    if path.is_dir() and (path / "quant_model_description.json").is_file():
        return read_ascend(path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        # What the official code saves has no config.json, unless someone copied the model's there.
        config = read_config(path) if (path / "config.json").is_file() else {}
        if isinstance(config.get("quantization_config"), dict):
            if "format_version" in config["quantization_config"]:
                raise UserError(f"{path} is a checkpoint of flatquant already; serve it as it is")
            if (foreign_tool(config["quantization_config"]) or "").startswith("a SqueezeBits"):
                return read_squeezebits(path)
        if "fake_quant_config" in config:
            raise UserError(
                f"{path} holds weights that are dequantized already (vllm_custom); convert its flat_matrices.pth "
                "with --model ORIGINAL instead"
            )
        if any(name.startswith("quantizer.") for name in WeightFiles(path).names):
            return read_realquant(path, model, scheme, kv)
    if matrices.is_file() and matrices.suffix in (".pth", ".pt"):
        return read_matrices(matrices, model, scheme, kv)
    raise UserError(f"{path} is not recognised; what can be converted: {FORMATS}")


def _card(found: ForeignModel) -> str:
    notes = "".join(f"\n- Approximated: {note}." for note in found.notes)
    return model_card(found.side, found.base, found.spec, None, "", f"{found.origin}\n{notes}".rstrip())


@torch.no_grad()
def golden_tensors(folder: Path) -> dict[str, Tensor]:
    """The self-test of a finished folder, as ``quantize`` writes it, on token ids drawn at random.

    Returns input_ids int64 [n], top_ids int64 [n, 8] and top_logits float32 [n, 8], descending.
    """
    config = load_config(folder)
    length = min(GOLDEN_TOKENS, getattr(config, "max_position_embeddings", GOLDEN_TOKENS))
    ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    logits = load_reference(folder)(ids[None], use_cache=False).logits[0].float()
    top = logits.topk(min(GOLDEN_TOP, logits.shape[-1]))
    return {"input_ids": ids, "top_ids": top.indices, "top_logits": top.values}
