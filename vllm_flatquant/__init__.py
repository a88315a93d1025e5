"""FlatQuant for vLLM. Importing this package is cheap; ``register`` is vLLM's plugin entry point."""

__version__ = "0.1.0"


def register() -> None:
    """Register the ``flatquant`` quantization method with vLLM. Idempotent, does not touch CUDA."""
    from . import config  # noqa: F401
