"""FlatQuant for vLLM. Importing this package is cheap; ``register`` is vLLM's plugin entry point."""

__version__ = "0.1.0"


def register() -> None:
    """Register the ``flatquant`` quantization method with vLLM. Idempotent, does not touch CUDA.

    vLLM calls this in every process (server, engine, workers), also for models that do not use FlatQuant.
    """
    from ._compat import check_engine_arguments, name_missing_tensors, register_quantization
    from .config import FlatQuantConfig

    register_quantization(FlatQuantConfig)
    check_engine_arguments(FlatQuantConfig)
    name_missing_tensors()
