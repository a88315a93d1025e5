"""The `vllm` command with this repository's plugin, whether it is installed or not, for benchmarks on made-up weights.

Imported, it does the same to the importing process: registers the plugin, fills integers of dummy weights with
random values (vLLM leaves what was in memory, often zeros, which a GPU multiplies faster), and logs the largest
amount of memory that loading took. Child processes, forked or spawned, do so as well.
"""

import functools
import time

import torch

import vllm_flatquant


def _random_integers() -> None:
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    original = weight_utils.initialize_single_dummy_weight

    @functools.wraps(original)
    def initialize(param, *args, **kwargs):
        if param.dtype in (torch.int8, torch.uint8, torch.int32):
            info = torch.iinfo(param.dtype)
            param.data.random_(info.min, info.max)
        else:
            original(param, *args, **kwargs)

    weight_utils.initialize_single_dummy_weight = initialize
    if hasattr(dummy_loader, "initialize_single_dummy_weight"):
        dummy_loader.initialize_single_dummy_weight = initialize


def _log_load() -> None:
    from vllm.logger import init_logger
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.load_model

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        start, cuda = time.perf_counter(), torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        original(self, *args, **kwargs)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        seconds = time.perf_counter() - start
        init_logger("vllm.benchmark").info("load: peak %d bytes, %.3f s", peak, seconds)

    Worker.load_model = load_model


vllm_flatquant.register()
_random_integers()
_log_load()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
