"""FlatQuant for vLLM. Importing this package is cheap; ``register`` is vLLM's plugin entry point."""

__version__ = "0.1.0"
VLLM_VERSIONS = ">=0.26,<0.34"


def register() -> None:
    """Register the ``flatquant`` quantization method with vLLM. Idempotent, does not touch CUDA.

    vLLM calls this in every process (server, engine, workers), also for models that do not use FlatQuant.
    """
    try:
        from ._compat import check_engine_arguments, name_missing_tensors, register_quantization
        from .config import FlatQuantConfig
    except (ImportError, AttributeError) as error:
        # An exception here would stop vLLM for every model, and vLLM shows warnings of its own logger only.
        import logging

        logging.getLogger("vllm.plugins.flatquant").warning(
            "vllm-flatquant %s works with vLLM %s; not registered (%s)",
            __version__,
            VLLM_VERSIONS,
            error,
        )
        return
    register_quantization(FlatQuantConfig)
    check_engine_arguments(FlatQuantConfig)
    name_missing_tensors()
