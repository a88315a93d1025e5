"""One format in one engine, for `serving.py`: its figures as JSON lines into a file, as they are measured.

Arguments: a JSON object {model, options, out, go, plan, profile, wanted}; it measures once the file ``go`` is there.
vLLM's engine runs in this process, so that all requests of a measurement are there before its first step.
"""

import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm_here  # noqa: F401  (here, so that spawned workers import it too)

WALL = "(wall time)"


class Probe:
    """Sends batches through an engine and times its steps."""

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self.engine, self.vocabulary, self.count = engine, vocabulary, 0
        self.random = torch.Generator().manual_seed(0)

    def add(self, batch: int, prompt: int, tokens: int) -> None:
        """Queue ``batch`` requests of ``prompt`` random ids that each make ``tokens`` tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for _ in range(batch):
            ids = torch.randint(3, self.vocabulary, (prompt,), generator=self.random).tolist()
            params = SamplingParams(
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": ids}, params)

    def finish(self) -> list[float]:
        """Run until nothing is left; the time after each step, in seconds."""
        times = []
        while self.engine.has_unfinished_requests():
            self.engine.step()
            times.append(time.perf_counter())
        return times

    def prefill(self, batch: int, prompt: int) -> float:
        """Milliseconds from the arrival of ``batch`` prompts to their first tokens."""
        start = time.perf_counter()
        self.add(batch, prompt, 1)
        return (self.finish()[-1] - start) * 1e3

    def decode(self, batch: int, prompt: int, tokens: int, ends: int) -> float:
        """Milliseconds of a decode step of ``batch`` sequences: mean of a run but for ``ends`` steps at either end."""
        every = tokens + 2 * ends
        self.add(batch, prompt, every)
        times = self.finish()
        if len(times) > every + 6:
            raise RuntimeError(f"{len(times)} steps for {every} tokens: the batch was split")
        times = times[-tokens - ends : -ends]
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3

    def drain(self, steps: int) -> None:
        """Run ``steps`` steps."""
        for _ in range(steps):
            self.engine.step()


def measures(probe: Probe, plan: dict[str, Any]) -> dict[str, Callable[[], float]]:
    """Measure -> a function that takes it once, in ms."""
    found: dict[str, Callable[[], float]] = {}
    for batch, prompt in plan["prefill"]:
        found[f"prefill_{batch}x{prompt}"] = lambda b=batch, p=prompt: probe.prefill(b, p)
    for batch in plan["decode"]:
        found[f"decode_b{batch}"] = lambda b=batch: probe.decode(
            b, plan["decode_prompt"], plan["decode_tokens"], plan["decode_ends"]
        )
    return found


def profile(probe: Probe, plan: dict[str, Any], write: Callable[..., None], folder: Path) -> None:
    """Kernels of a decode step and of a prefill step: how often, how long, and the step's wall time.

    Where the host spends a prefill step is written to ``folder``/host_*.txt.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = torch.cuda.is_available()
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU

    def trace(phase: str, steps: int, prepare: Callable[[], None], run: Callable[[], None]) -> None:
        for _ in range(2):  # the first trace pays for the profiler's own start
            prepare()
            with torch_profile(activities=[kind]) as traced:
                start = time.perf_counter()
                run()
                if cuda:
                    torch.cuda.synchronize()
                wall = (time.perf_counter() - start) * 1e6
            probe.finish()
        for event in traced.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            if event.device_type == device and us > 0:
                write(phase=phase, kernel=event.key, count=event.count / steps, us=us / steps)
        write(phase=phase, kernel=WALL, count=1, us=wall / steps)

    prompt, steps = plan["decode_prompt"], 8
    for batch in plan["profile_decode"]:

        def running(batch: int = batch) -> None:
            probe.add(batch, prompt, 4 * steps)
            probe.drain(2 * steps)

        trace(f"decode_b{batch}", steps, running, lambda: probe.drain(steps))
    for batch, prompt in plan["prefill"]:

        def prefill(batch: int = batch, prompt: int = prompt) -> None:
            probe.add(batch, prompt, 1)
            probe.finish()

        trace(f"prefill_{batch}x{prompt}", 1, lambda: None, prefill)
        on_host = cProfile.Profile()
        on_host.runcall(prefill)
        with (folder / f"host_prefill_{batch}x{prompt}.txt").open("w") as file:
            for order in ("tottime", "cumtime"):
                pstats.Stats(on_host, stream=file).sort_stats(order).print_stats(60)


def main() -> None:
    """Start the engine, measure, write lines."""
    job, parent = json.loads(sys.argv[1]), os.getppid()
    out = Path(job["out"])

    def write(**row: Any) -> None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(model=job["model"], **job["options"])
    # vLLM is imported by then: a server's start is this and the imports, which no format changes.
    write(measure="start", value=time.perf_counter() - started, unit="s")
    config = llm.llm_engine.vllm_config
    if "kv_cache_memory_bytes" not in job["options"]:  # then these say something
        blocks = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        write(measure="kv_tokens", value=blocks, unit="tokens")
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            write(measure="memory_used", value=(total - free) / 2**30, unit="GiB")
    while not Path(job["go"]).exists():
        if os.getppid() != parent:
            sys.exit("whoever was to say when to measure is gone")
        time.sleep(0.1)

    plan = job["plan"]
    probe = Probe(llm.llm_engine, config.model_config.get_vocab_size())
    for name, take in measures(probe, plan).items():
        if name not in job["wanted"]:
            continue
        try:
            take()
            figures = [take() for _ in range(plan["repeats"])]
        except RuntimeError as error:
            write(error=f"{name}: {error}")
            probe.finish()
            continue
        middle = statistics.median(figures)
        spread = (max(figures) - min(figures)) / middle
        write(measure=name, value=middle, unit="ms", spread=spread, repeats=len(figures))
    if job["profile"]:
        probe.prefill(1, 64)
        profile(probe, plan, write, out.parent)
    write(measure="finished", value=1, unit="")


if __name__ == "__main__":
    main()
