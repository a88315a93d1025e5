"""FlatQuantConfig: which quantization method each layer of a model gets."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _compat, fusion
from ._compat import (
    Attention,
    Deployment,
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
    WeightsMapper,
)
from .attention import FlatQuantKVCacheMethod, check_cache_dtype
from .choice import choose_backend
from .errors import UnsupportedError
from .files import check_files
from .linear import FlatQuantLinearMethod, tensor_parallel_message
from .lm_head import FlatQuantHeadMethod
from .sites import ignored_parts, is_quantized, rename_rules, site_of
from .spec import QUANT_METHOD, FlatQuantSpec, parse_spec


class FlatQuantConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's ``quantization_config``."""

    # vLLM's default skips unknown tensors with such endings; our checkpoints have none, so any is an error.
    _ignore_unexpected_suffixes = ()  # type: ignore[assignment]

    def __init__(self, spec: FlatQuantSpec | None = None) -> None:
        """vLLM passes no spec when a user asks for flatquant on an unquantized model: UnsupportedError."""
        super().__init__()
        if spec is None:
            raise UnsupportedError(
                "--quantization flatquant needs a model that `flatquant quantize` has made, and this one's "
                "config.json has no quantization_config; quantize it first, or drop the option"
            )
        self.spec = spec
        self.backend = choose_backend(_compat.cuda_capability())
        self._announced = False

    def __repr__(self) -> str:
        return f"FlatQuantConfig({self.spec!r})"

    @classmethod
    def get_name(cls) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # the torch backend needs none

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FlatQuantConfig":
        """Raises SpecError if ``config`` is not a format that this version reads."""
        return cls(parse_spec(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Never overrides; checks our own configs here because this is where vLLM first reads them."""
        if isinstance(hf_quant_cfg, dict) and hf_quant_cfg.get("quant_method") == QUANT_METHOD:
            parse_spec(hf_quant_cfg)
        return None

    def get_cache_scale_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Checkpoint names of transforms -> parameter names; vLLM applies it to every tensor it loads."""
        return WeightsMapper(orig_to_new_regex=dict(rename_rules()))

    def check_deployment(self, options: Deployment) -> None:
        """Raise UnsupportedError for options that FlatQuant cannot serve."""
        if options.lora:
            raise UnsupportedError("FlatQuant does not serve LoRA adapters; start without --enable-lora")
        if options.pipeline_parallel > 1:
            raise UnsupportedError(
                f"FlatQuant does not serve --pipeline-parallel-size {options.pipeline_parallel}; use 1"
            )
        if self.spec.shards % options.tensor_parallel:
            raise UnsupportedError(tensor_parallel_message(self.spec.shards, options.tensor_parallel))
        check_cache_dtype(self.spec, options.kv_cache_dtype)

    def check_files(self, folder: Path, hf_config: Any) -> None:
        """Raise CheckpointError if the folder of a model with that config is damaged or incomplete."""
        check_files(folder, self.spec, hf_config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for ``layer``; None leaves it to vLLM. Raises UnsupportedError."""
        if not self._announced:
            self._announced = True
            self.check_deployment(_compat.deployment())
            _compat.logger.info(
                "FlatQuant %s: %s backend (%s)", self.spec.scheme, self.backend.name, self.backend.reason
            )
            if fusion.active(self.backend.name, self.spec):
                fusion.install()
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, ParallelLMHead) and self.spec.lm_head_bits < 16:
            return FlatQuantHeadMethod(self.backend.name, prefix)
        if isinstance(layer, Attention):
            # One layer can have a cache dtype of its own (--kv-cache-dtype-skip-layers).
            check_cache_dtype(self.spec, str(layer.kv_cache_dtype))
            if min(self.spec.kv.k_bits, self.spec.kv.v_bits) < 16:
                return FlatQuantKVCacheMethod(self, self.spec)
        elif _compat.is_moe_layer(layer):
            raise UnsupportedError(
                f"{prefix} is a mixture-of-experts layer, which FlatQuant does not serve; "
                "use a dense model (Llama, Mistral, Qwen2, Qwen3)"
            )
        return None

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        prefix = prefix.removeprefix(_compat.DRAFT_PREFIX)  # ``ignore`` has the checkpoint's names
        site = site_of(prefix)
        if site is not None and is_quantized(self.spec, prefix):
            return FlatQuantLinearMethod(self.spec, site, self.backend.name)
        if not ignored_parts(self.spec, prefix):
            raise UnsupportedError(
                f"{prefix} is a linear layer that FlatQuant does not quantize; "
                "use a supported model (Llama, Mistral, Qwen2, Qwen3) or list the layer in ignore"
            )
        return UnquantizedLinearMethod()
