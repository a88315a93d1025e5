"""One format in one engine, for `serving.py`: its figures as JSON lines into a file, as they are measured.

Arguments: a JSON object {model, options, out, go, plan, profile, wanted, begun}; it measures once the file ``go`` is there.
vLLM's engine core runs in a process of its own, as users get it. The scheduler is paused while the requests of a
measurement are sent, so that all are there before its first step.
"""

import gc
import json
import os
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

    def pause(self) -> None:
        """Let the engine finish the steps it has begun, and begin no other. Requests may come; nothing is lost."""
        self.engine.sleep(0, "keep")

    def resume(self) -> None:
        """Let the engine begin steps again."""
        self.engine.wake_up(["scheduling"])

    def add(self, batch: int, prompt: int, tokens: int) -> None:
        """Pause, and queue ``batch`` requests of ``prompt`` random ids that each make ``tokens`` tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.pause()
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

    def finish(self) -> tuple[list[float], int]:
        """Resume and run until nothing is left: the time after each step, in seconds; requests that the last ended."""
        self.resume()
        times, ended = [], 0
        while self.engine.has_unfinished_requests():
            ended = len(self.engine.step())
            times.append(time.perf_counter())
        return times, ended

    def prefill(self, batch: int, prompt: int) -> float:
        """Milliseconds from the start on ``batch`` prompts, all in one step, to the arrival of their first tokens."""
        self.add(batch, prompt, 1)
        start = time.perf_counter()
        times, ended = self.finish()
        if ended != batch:
            raise RuntimeError(f"{ended} of {batch} prompts were in the last step: the batch was split")
        return (times[-1] - start) * 1e3

    def decode(self, batch: int, prompt: int, tokens: int, ends: int) -> float:
        """Milliseconds of a decode step of ``batch`` sequences: mean of a run but for ``ends`` steps at either end."""
        every = tokens + 2 * ends
        self.add(batch, prompt, every)
        times, _ = self.finish()
        if len(times) > every + 6:
            raise RuntimeError(f"{len(times)} steps for {every} tokens: the batch was split")
        times = times[-tokens - ends : -ends]
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3

    def start(self, batch: int, prompt: int, tokens: int, steps: int) -> None:
        """Run ``batch`` requests for ``steps`` steps or a few more, and pause."""
        self.add(batch, prompt, tokens)
        self.resume()
        for _ in range(steps):
            self.engine.step()
        self.pause()
        # The pause is answered when every step has ended and its output has come.
        while not self.engine.engine_core.outputs_queue.empty():
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


def repeated(take: Callable[[], float], least: int, seconds: float) -> list[float]:
    """What ``take`` gives, ``least`` times or for ``seconds``, whatever is longer."""
    figures, end = [], time.perf_counter() + seconds
    while len(figures) < least or time.perf_counter() < end:
        figures.append(take())
    return figures


def profile(probe: Probe, plan: dict[str, Any], write: Callable[..., None]) -> None:
    """Kernels of a decode step and of a prefill step on the first GPU: how often, how long, and the step's wall time."""

    def trace(phase: str, prepare: Callable[[], None]) -> None:
        for _ in range(2):  # the first trace pays for the profiler's own start
            prepare()
            probe.engine.collective_rpc("begin_trace")
            begin, start = time.time_ns(), time.perf_counter()
            times, _ = probe.finish()
            span = begin, time.time_ns()
            kernels = probe.engine.collective_rpc("end_trace", args=span)[0]
        for kernel in kernels:
            count, us = kernel["count"] / len(times), kernel["us"] / len(times)
            write(phase=phase, kernel=kernel["kernel"], count=count, us=us)
        write(phase=phase, kernel=WALL, count=1, us=(times[-1] - start) / len(times) * 1e6)

    prompt, tokens, begun = plan["decode_prompt"], 64, 8
    for batch in plan["profile_decode"]:
        trace(f"decode_b{batch}", lambda b=batch: probe.start(b, prompt, tokens, begun))
    for batch, prompt in plan["prefill"]:
        trace(f"prefill_{batch}x{prompt}", lambda b=batch, p=prompt: probe.add(b, p, 1))


def main() -> None:
    """Start the engine, measure, write lines."""
    job, parent = json.loads(sys.argv[1]), os.getppid()
    out = Path(job["out"])

    def wanted() -> None:
        if os.getppid() != parent:
            sys.exit("whoever was to read the rows is gone")

    def write(**row: Any) -> None:
        wanted()
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    from vllm import LLM

    imports, started = time.time() - job["begun"], time.perf_counter()
    llm = LLM(model=job["model"], worker_extension_cls="serving_worker.Tracer", **job["options"])
    # vLLM is imported by then: a server's start is this and the imports, which no format changes.
    write(measure="start", value=time.perf_counter() - started, unit="s", imports=imports)
    config = llm.llm_engine.vllm_config
    if "kv_cache_memory_bytes" not in job["options"]:  # then these say something
        blocks = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        write(measure="kv_tokens", value=blocks, unit="tokens")
        if used := llm.collective_rpc("card_memory_used")[0]:
            write(measure="memory_used", value=used, unit="GiB")
    while not Path(job["go"]).exists():
        wanted()
        time.sleep(0.1)

    gc.collect()
    gc.freeze()  # as vLLM's server does
    plan = job["plan"]
    probe = Probe(llm.llm_engine, config.model_config.get_vocab_size())
    for name, take in measures(probe, plan).items():
        if name not in job["wanted"]:
            continue
        try:
            take()
            figures = repeated(take, plan["repeats"], plan["seconds"])
        except RuntimeError as error:
            write(error=f"{name}: {error}")
            probe.finish()
            continue
        middle = statistics.median(figures)
        spread = (max(figures) - min(figures)) / middle
        fastest = min(figures)
        write(
            measure=name, value=middle, unit="ms", spread=spread, repeats=len(figures), fastest=fastest
        )
    if job["profile"]:
        profile(probe, plan, write)
    write(measure="finished", value=1, unit="")


if __name__ == "__main__":
    main()
