"""What `serving_engine.py` asks of the process that has the GPU: vLLM mixes ``Tracer`` into its worker."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class Tracer:
    """Methods of vLLM's worker, called by name through ``collective_rpc``."""

    def card_memory_used(self) -> float | None:
        """GiB in use on the card, by whomever; None without one."""
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def begin_trace(self) -> None:
        """Record kernels from here on; without a GPU, operators."""
        cuda = torch.cuda.is_available()
        self.benchmark_trace = profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        )
        self.benchmark_trace.start()

    def end_trace(self) -> list[dict[str, Any]]:
        """Kernels since ``begin_trace``: name, how often, microseconds in all."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        self.benchmark_trace.stop()
        device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        found = []
        for event in self.benchmark_trace.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            if event.device_type == device and us > 0:
                found.append({"kernel": event.key, "count": event.count, "us": us})
        return found
