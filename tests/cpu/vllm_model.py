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


def load_model(folder: Path, device: str = "cpu", **options: Any) -> nn.Module:
    """The vLLM model in ``folder`` on ``device`` with its weights loaded and processed."""
    return load_configured(engine_config(folder, **options), device)


def load_configured(config: Any, device: str = "cpu") -> nn.Module:
    """``load_model`` for a VllmConfig."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    start_single_process()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
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
