"""A Hugging Face model folder, read one block at a time."""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedError, shown
from ..files import (
    check_sizes,
    check_tensors,
    file_inside,
    first_line,
    head_size,
    stored_tensors,
    weight_files,
)
from ..sites import check_head_dim, checkpoint_shapes
from ..spec import FlatQuantSpec
from .architectures import Architecture, find_architecture
from .attention import ATTENTION
from .errors import UserError
from .hub import why_not_downloaded

SIDE_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
)
"""Tokenizer, generation and licence files that go along with a checkpoint."""

FROM_HUB = ("*.safetensors", "*.json", *SIDE_FILES, "README.md", "calibration_log.jsonl")
NOT_FROM_HUB = ("consolidated*", "*/*")
"""What a download fetches, and what of it not: Mistral's second copy of all weights, and subfolders, which nothing
reads."""

GOLDEN = "golden.safetensors"
"""A checkpoint's self-test, no part of the weights."""


class ModelSource:
    """An unquantized model on disk.

    Attributes: path, config (Transformers), arch, dtype (of the linear weights), num_blocks.
    Raises UserError for every kind of folder that cannot be quantized.
    """

    def __init__(self, model: str | Path):
        self.path = resolve_folder(model)
        self.raw_config = read_config(self.path)
        given = self.raw_config.get("quantization_config")
        if given is not None:
            method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
            raise UserError(
                f"{self.path} is already quantized (quant_method '{shown(method)}'); start from the original model"
            )
        self.arch: Architecture = find_architecture(self.raw_config.get("model_type"))
        self.config: PreTrainedConfig = load_config(self.path)
        self.files = WeightFiles(self.path)
        self.model: Any = meta_model(self.config)
        self.num_blocks: int = self.config.num_hidden_layers
        check_weights(self.path, self.config, self.files)
        self.dtype = self.files.dtype(f"{self.arch.blocks}.0.{self.arch.o}.weight")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return head_size(self.config)

    def block_prefix(self, index: int) -> str:
        """``model.layers.N.``"""
        return f"{self.arch.blocks}.{index}."

    @property
    def scale_dtype(self) -> torch.dtype:
        """Type of the weight scales that a weight-only GEMM reads: the dtype that config.json names, which is
        what vLLM serves in, whatever the tensors are stored as; bf16 if that has 32 bits."""
        named = self.config.dtype or self.dtype
        return named if named in (torch.bfloat16, torch.float16) else torch.bfloat16

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block under names relative to it, in their stored dtype, on the CPU."""
        prefix = self.block_prefix(index)
        names = [n for n in self.files.names if n.startswith(prefix) and "rotary_emb" not in n]
        return {n.removeprefix(prefix): self.files.tensor(n) for n in names}

    def load_block(
        self, index: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The decoder layer ``index`` with weights of ``dtype`` on ``device``; the model keeps none of it."""
        with torch.device("meta"):
            layer = type(self.model.get_submodule(self.arch.blocks)[index])(self.config, index)
        state = {n: t.to(device, dtype) for n, t in self.block_tensors(index).items()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).eval()

    def other_names(self) -> list[str]:
        """Names of the tensors outside the blocks (embeddings, final norm, lm_head)."""
        return [
            n
            for n in self.files.names
            if not n.startswith(self.arch.blocks + ".")
            and not n.endswith("rotary_emb.inv_freq")
            and not (
                n == "lm_head.weight" and self.config.tie_word_embeddings
            )  # a copy of the embedding
        ]


class WeightFiles:
    """Safetensors shards of a folder: which tensor is where."""

    def __init__(self, path: Path):
        self.path = path
        try:
            files = weight_files(path, skip={GOLDEN})
            if not files:
                raise UserError(_no_weights(path))
            self.stored = stored_tensors(path, skip={GOLDEN})
        except CheckpointError as error:
            raise UserError(str(error)) from None

    @property
    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self.stored)

    @property
    def shards(self) -> list[Path]:
        """The files, sorted."""
        return sorted({Path(stored.file) for stored in self.stored.values()})

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the data."""
        return self.stored[name].shape

    def dtype(self, name: str) -> Any:
        """Stored dtype, without reading the data; the string of safetensors if PyTorch has none for it."""
        stored = self.stored[name].dtype
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(stored, stored)

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def tensor(self, name: str, check: bool = True) -> Tensor:
        """The tensor on the CPU; UserError if it holds NaN or inf."""
        file = self.stored[name].file
        try:
            with safe_open(file, framework="pt") as f:
                tensor = f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}); download it again") from None
        if check and tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(
                f"{file}: tensor {name} holds NaN or inf; the model is damaged, download it again"
            )
        return tensor


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or inf. A finite sum tells so in one pass, and in no memory of its own."""
    parts = values.flatten().split(1 << 24)
    return bool(torch.isfinite(values.sum())) or all(bool(torch.isfinite(p).all()) for p in parts)


def check_weights(
    path: Path, config: PreTrainedConfig, files: WeightFiles, spec: FlatQuantSpec | None = None
) -> None:
    """UserError that names the first missing, unknown, misshapen or mistyped tensor of a model folder, or of
    a checkpoint with that spec, or what the spec's ``ignore`` cannot name."""
    shapes = {n: tuple(t.shape) for n, t in meta_model(config).state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    try:
        if spec is not None:
            check_head_dim(spec, head_size(config))
            shapes = checkpoint_shapes(spec, shapes, find_architecture(config.model_type).blocks)
        check_tensors(path, files.stored, shapes)
    except (CheckpointError, UnsupportedError) as error:
        raise UserError(str(error)) from None


def _no_weights(path: Path) -> str:
    if any(any(path.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        return (
            f"{path} has only pickle weights (.bin, .pt), which can run code when read; convert "
            "them to safetensors (save_pretrained does) and try again"
        )
    return f"{path} has no .safetensors weights; download the model again"


def folder_file(path: Path, name: str) -> Path:
    """The file ``name`` of a model folder; UserError if it is a link out of the folder."""
    try:
        return file_inside(path, name)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def resolve_folder(model: str | Path) -> Path:
    """A local folder, or a hub name downloaded to the Hugging Face cache; UserError if neither."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        holds = (path.absolute().parent / "config.json").is_file()
        fix = f"give its folder, {path.absolute().parent}" if holds else "give a model's folder"
        raise UserError(f"{model} is a file; {fix}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or path.exists():
        raise UserError(
            f"model folder {model} does not exist; give a folder or a Hugging Face name (org/name)"
        )
    try:
        return Path(
            snapshot_download(
                str(model), allow_patterns=list(FROM_HUB), ignore_patterns=list(NOT_FROM_HUB)
            )
        )
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; each means the same here
        raise UserError(
            f"{model} is no folder and was not downloaded: {why_not_downloaded(error)}"
        ) from None


def check_context(config: PreTrainedConfig, seq_len: int) -> None:
    """UserError if rows of ``seq_len`` tokens are longer than what the model was made for."""
    context = getattr(config, "max_position_embeddings", seq_len)
    if seq_len > context:
        raise UserError(
            f"seq_len={seq_len} is beyond the model's context of {context} tokens; use --seq-len {context}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict; UserError if there is none or it is no JSON object."""
    file = folder_file(path, "config.json")
    if not file.exists():
        raise UserError(f"{path} has no config.json; give the folder of a Hugging Face model")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file; UserError if it holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({first_line(error)}); download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object; download it again")
    return found


def load_config(path: Path) -> PreTrainedConfig:
    """Transformers' config of a folder; UserError with its complaint if it has one."""
    try:
        check_sizes(read_config(path))
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # What a model returns is for whoever runs it to say, not for the file.
        config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
        return config
    except CheckpointError as error:
        raise UserError(f"{path}/{error}") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; each means the same here
        raise UserError(
            f"{path}/config.json is not a usable model config ({first_line(error)}); download it again"
        ) from None


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights (on the meta device), with our attention hook and real RoPE tables."""
    config._attn_implementation = ATTENTION
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
        base: Any = model.model
        base.rotary_emb = type(base.rotary_emb)(config=config)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; each means the same here
        raise UserError(
            f"config.json describes no usable model ({type(error).__name__}: {first_line(error)}); download it "
            "again"
        ) from None
    return model.eval().requires_grad_(False)
