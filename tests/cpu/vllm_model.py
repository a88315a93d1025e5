"""vLLM models and layers in this process, loaded from a checkpoint as an engine would, without an engine."""

import functools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn


@functools.cache
def start_single_process() -> None:
    """Make vLLM's process groups for a world of one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo")
        initialize_model_parallel(1, 1)


def engine_config(folder: Path, **options: Any) -> Any:
    """The VllmConfig that ``vllm serve folder`` would use, in the checkpoint's dtype."""
    from vllm.engine.arg_utils import EngineArgs

    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    arguments = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "dtype": dtype,
    }
    arguments |= options
    return EngineArgs(model=str(folder), **arguments).create_engine_config()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """``dtype`` is torch's default inside. vLLM 0.26's own stays where it is when a model is refused."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_model(folder: Path, device: str = "cpu", **options: Any) -> nn.Module:
    """The vLLM model in ``folder`` on ``device`` with its weights loaded and processed."""
    return load_configured(engine_config(folder, **options), device)


def load_configured(config: Any, device: str = "cpu") -> nn.Module:
    """``load_model`` for a VllmConfig."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    start_single_process()
    with set_current_vllm_config(config), default_dtype(config.model_config.dtype):
        with torch.device(device):
            model = initialize_model(config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device(device))
    return model.eval()


@contextmanager
def tensor_parallel(rank: int, size: int) -> Iterator[None]:
    """Layers built inside believe to be rank ``rank`` of ``size``."""
    start_single_process()
    names = {"get_tensor_model_parallel_rank": rank, "get_tensor_model_parallel_world_size": size}
    with (
        mock.patch.multiple(
            "vllm.model_executor.layers.linear",
            **{k: mock.Mock(return_value=v) for k, v in names.items()},
        ),
        mock.patch.multiple(
            "vllm.model_executor.parameter", **{k: mock.Mock(return_value=v) for k, v in names.items()}
        ),
    ):
        yield


def layers_and_references(folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each quantized layer of the checkpoint in ``folder``: its site, and for random inputs what it gives and what
    calibration's reference gives, both [T, N] in the checkpoint's dtype."""
    from vllm_flatquant.calibration.reference import load_reference
    from vllm_flatquant.sites import SITES

    model = load_model(folder)
    dtype = next(model.model.layers[0].modules()).self_attn.qkv_proj.params_dtype
    reference = load_reference(folder, dtype=dtype)
    for block, expected in zip(model.model.layers, reference.model.layers, strict=True):
        for site in SITES:
            layer = block.get_submodule(site.module)
            parent = expected.get_submodule(site.module.partition(".")[0])
            x = torch.randn(9, layer.input_size).to(dtype)
            with torch.inference_mode():
                goal = torch.cat([parent.get_submodule(part)(x) for part in site.parts], dim=-1)
                yield site.name, layer(x)[0], goal
