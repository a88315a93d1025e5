"""Everything of vLLM that is private or differs between versions 0.26 and 0.33; nothing else may import it."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from vllm.platforms import current_platform

from .errors import CheckpointError, UnsupportedError
from .files import check_not_foreign, check_servable
from .spec import QUANT_METHOD, SpecError

__all__ = [
    "Attention",
    "BaseKVCacheMethod",
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RowvLLMParameter",
    "UnquantizedLinearMethod",
    "WeightsMapper",
    "register_weight_loader_v2_supported_method",
]

DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of the modules of a model that drafts for another (``DraftModelProposer``)."""

logger = init_logger("vllm.plugins.flatquant")  # vLLM shows INFO only from loggers below "vllm"


@dataclass(frozen=True)
class Deployment:
    """The options of a vLLM run that FlatQuant has an opinion on."""

    tensor_parallel: int
    pipeline_parallel: int
    lora: bool
    load_format: str
    kv_cache_dtype: str
    local_ranks: int = 1
    """Ranks of an engine that share this host: tensor- and pipeline-parallel ones."""

    @property
    def loads_tensors(self) -> bool:
        """Whether named checkpoint tensors reach the layers before their weights are processed."""
        return self.load_format not in ("dummy", "sharded_state")

    @property
    def dummy(self) -> bool:
        """Whether weights are made up (``--load-format dummy``)."""
        return self.load_format == "dummy"


def deployment(vllm_config: Any = None) -> Deployment:
    """The options of ``vllm_config``, by default of the run that is being built."""
    config = vllm_config if vllm_config is not None else get_current_vllm_config()
    return Deployment(
        tensor_parallel=config.parallel_config.tensor_parallel_size,
        pipeline_parallel=config.parallel_config.pipeline_parallel_size,
        lora=config.lora_config is not None,
        load_format=str(config.load_config.load_format),
        kv_cache_dtype=str(config.cache_config.cache_dtype),
        local_ranks=config.parallel_config.local_world_size,
    )


def token_limit() -> int:
    """The most tokens that one forward pass of the run that is being built can have."""
    return int(get_current_vllm_config().scheduler_config.max_num_batched_tokens)


def compiles_graphs() -> bool:
    """Whether vLLM compiles the model of the run that is being built, and with passes of its own choice."""
    config = get_current_vllm_config().compilation_config
    uncompiled = (None, CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE)
    return config.mode not in uncompiled and config.backend in ("", "inductor")


def add_graph_pass(run: Callable[[fx.Graph], None], identity: str) -> None:
    """Have the compiler call ``run`` on every functional graph of the run that is being built. Idempotent.

    identity: goes into the keys of the compile caches. The slot is ``--compilation-config``'s
    ``inductor_passes``: a pass that the user has put there runs after ours.
    """
    from vllm.compilation.passes.inductor_pass import CallableInductorPass

    options = get_current_vllm_config().compilation_config.inductor_compile_config
    users: Any = options.get(current_platform.pass_key)
    if getattr(users, "_flatquant", False):
        return

    def both(graph: fx.Graph) -> None:
        run(graph)
        users(graph)

    ours = CallableInductorPass(
        run if users is None else both, identity if users is None else f"{identity}, {users.uuid()}"
    )
    cast(Any, ours)._flatquant = True
    options[current_platform.pass_key] = ours


def _wrap(module: str, owner: str, method: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator: calls of a method of vLLM become ``wrapper(original, self, ...)``. Idempotent; does nothing where
    vLLM has no such method."""

    def install(wrapper: Callable[..., Any]) -> None:
        try:
            cls: Any = getattr(importlib.import_module(module), owner)
            original = getattr(cls, method)
        except (ImportError, AttributeError):
            return
        if getattr(original, "_flatquant", False):
            return

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        cast(Any, wrapped)._flatquant = True
        setattr(cls, method, wrapped)

    return install


def watch_pieces(watch: Callable[[str, Any, bool, bool], None]) -> None:
    """Call ``watch(tokens, artifact, first, last)`` after each piece of a graph is compiled. Idempotent.

    tokens: the range of token counts that the piece is for. The method that is wrapped may change: then
    nothing is called, and only a log line is lost.
    """
    names = ("compile_range", "graph_index", "num_graphs")

    @_wrap("vllm.compilation.backends", "CompilerManager", "compile")
    def compile(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        artifact = original(self, *args, **kwargs)
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        if not set(names) <= bound.arguments.keys():
            return artifact
        tokens, index, count = (bound.arguments[name] for name in names)
        start, end = getattr(tokens, "start", "?"), getattr(tokens, "end", "?")
        watch(f"{start} to {end}", artifact, index == 0, index == count - 1)
        return artifact


def is_cpu() -> bool:
    """Whether vLLM runs on its CPU platform."""
    return current_platform.is_cpu()


def cuda_capability() -> int | None:
    """Compute capability as 80, 90, ...; None without a CUDA device."""
    if not current_platform.is_cuda():
        return None
    capability = current_platform.get_device_capability()
    return None if capability is None else capability.to_int()


def is_moe_layer(layer: nn.Module) -> bool:
    """Whether ``layer`` holds routed experts (the class has had three names)."""
    return any(cls.__name__ in ("RoutedExperts", "FusedMoE") for cls in type(layer).__mro__)


def output_parts(layer: nn.Module) -> list[tuple[str | int | None, int]]:
    """The stacked parts of a linear layer: vLLM's shard id and the whole, unsplit output size of each."""
    if isinstance(layer, QKVParallelLinear):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        v_size = getattr(layer, "v_head_size", layer.head_size)
        return [
            ("q", heads * layer.head_size),
            ("k", kv_heads * layer.head_size),
            ("v", kv_heads * v_size),
        ]
    if isinstance(layer, MergedColumnParallelLinear):
        return list(enumerate(layer.output_sizes))
    return [(None, cast(int, layer.output_size))]


def register_quantization(config_class: type[QuantizationConfig]) -> None:
    """Make vLLM use ``config_class`` for ``quant_method: flatquant``. Idempotent."""
    register_quantization_config(QUANT_METHOD)(config_class)


def check_engine_arguments(config_class: Any) -> None:
    """Have ``config_class.check_deployment`` called before the engine starts. Idempotent.

    Without this vLLM builds a first layer in a worker process before our checks run. The method it
    wraps may change its name: then the checks in the worker remain.
    """

    @_wrap("vllm.engine.arg_utils", "EngineArgs", "create_engine_config")
    def create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            vllm_config = original(self, *args, **kwargs)
            if isinstance(vllm_config.quant_config, config_class):
                check_servable(vllm_config.model_config.hf_config)
                vllm_config.quant_config.check_deployment(deployment(vllm_config))
                if _reads_safetensors(vllm_config.load_config):
                    _check_folder(vllm_config.quant_config, vllm_config.model_config)
                    _track_other_weights(vllm_config.load_config)
            elif vllm_config.quant_config is None:
                check_not_foreign(
                    Path(vllm_config.model_config.model), vllm_config.model_config.hf_config
                )
            return vllm_config
        except ValueError as error:
            ours = _our_error(error)
            if ours is None:
                raise
            if Path(sys.argv[0]).name == "vllm":  # a sentence for the command line, not a traceback
                sys.exit(f"vllm: error: {ours}")
            raise ours from None


_OURS = (UnsupportedError, CheckpointError, SpecError)


def _our_error(error: ValueError) -> ValueError | None:
    """``error`` if it is ours, or ours inside the ValidationError that pydantic made of it."""
    if isinstance(error, _OURS):
        return error
    details = cast(Any, error).errors() if hasattr(error, "errors") else []
    for detail in details:
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, _OURS):
            return inner
    return None


def name_missing_tensors() -> None:
    """Have our layers name the tensors that they miss before vLLM lists the parameters. Idempotent.

    Without this a missing tensor is an error as well, in terms of vLLM's parameters.
    """

    @_wrap(
        "vllm.model_executor.model_loader.default_loader", "DefaultModelLoader", "track_weights_loading"
    )
    def track_weights_loading(
        original: Any, self: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        for module in model.modules():
            check = getattr(getattr(module, "quant_method", None), "check_loaded", None)
            if check is not None:
                check(module)
        return original(self, model, *args, **kwargs)


def _track_other_weights(load_config: Any) -> None:
    """Ask vLLM to notice missing norm weights; by default it does so for unquantized models only."""
    if isinstance(load_config.model_loader_extra_config, dict):
        load_config.model_loader_extra_config.setdefault("enable_weights_track", True)


def _reads_safetensors(load_config: Any) -> bool:
    return str(load_config.load_format) in ("auto", "safetensors", "hf")


def _check_folder(quant_config: Any, model_config: Any) -> None:
    """Look at the checkpoint's files if the model is a local folder of the usual kind."""
    folder = Path(model_config.model)
    if folder.is_dir():
        quant_config.check_files(folder, model_config.hf_config)


def scaled_int8_product() -> Callable[..., Tensor]:
    """vLLM's int8 matrix product with scales (CUTLASS): (codes int8 [T, K], weight int8 [K, N] with K
    contiguous, float32 [T, 1], float32 [N, 1], out dtype, bias [N] or None) -> [T, N].

    Raises UnsupportedError where vLLM was built without it.
    """
    try:
        from vllm._custom_ops import cutlass_scaled_mm

        _ = torch.ops._C.cutlass_scaled_mm
    except (ImportError, AttributeError):
        raise UnsupportedError(
            "this vLLM has no int8 matrix product (cutlass_scaled_mm), which 8-bit weights with 8-bit "
            "activations need on a GPU; install vLLM's CUDA build or use the w4a8 or w8a16 scheme"
        ) from None
    return cutlass_scaled_mm


class WeightOnlyKernel:
    """vLLM's own kernel for 16-bit activations times 4- or 8-bit weights (Machete, Marlin, ...).

    Chosen when the layer is built, as vLLM's own quantization methods do.
    """

    def __init__(
        self,
        full_shape: tuple[int, int],
        local_shape: tuple[int, int],
        bits: int,
        group_size: int | None,
        dtype: torch.dtype,
    ) -> None:
        """full_shape, local_shape: [in, out] of the layer and of this rank's part of it."""
        from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
        from vllm.scalar_type import scalar_types

        options: dict[str, Any] = {
            "full_weight_shape": full_shape,
            "partition_weight_shape": local_shape,
            "weight_type": scalar_types.uint8b128 if bits == 8 else scalar_types.uint4b8,
            "act_type": dtype,
            "group_size": -1 if group_size is None else group_size,
            "zero_points": False,
            "has_g_idx": False,
        }
        known = {field.name for field in fields(MPLinearLayerConfig)}  # has_g_idx: gone after 0.26
        config = MPLinearLayerConfig(**{key: value for key, value in options.items() if key in known})
        try:
            kernel_type = choose_mp_linear_kernel(config)
        except ValueError as error:
            raise UnsupportedError(
                f"vLLM has no {bits}-bit weight kernel here for a layer of {full_shape[0]} x {full_shape[1]} "
                f"in {dtype}; serve with --dtype bfloat16 or use the w4a8 scheme ({error})"
            ) from None
        logger.info_once("FlatQuant's %d-bit weights use vLLM's %s", bits, kernel_type.__name__)
        self._kernel = kernel_type(config, "weight_packed", "weight_scale")

    def process(self, layer: nn.Module, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Give ``layer`` the kernel's weights. packed: uint8 [N, K/2] (int8 [N, K]) of our format.
        scale: [N, groups]."""
        # The kernels take code + 8 in each nibble (code + 128 in each byte), low ones first in an int32: our
        # order, with two's complement turned into an offset by flipping the top bit of each code.
        narrow = packed.dtype == torch.uint8
        words = (packed.view(torch.uint8) ^ (0x88 if narrow else 0x80)).contiguous().view(torch.int32)
        loader: Callable[..., Any] = _no_reload
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                data=words,
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=8 if narrow else 4,
                weight_loader=loader,
            ),
        )
        layer.register_parameter(
            "weight_scale",
            GroupQuantScaleParameter(
                data=scale.to(dtype).contiguous(), input_dim=1, output_dim=0, weight_loader=loader
            ),
        )
        self._kernel.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N]."""
        return self._kernel.apply_weights(layer, x, bias)


def _no_reload(*_: Any) -> None:
    raise UnsupportedError("FlatQuant weights cannot be reloaded in a running engine; start a new one")
