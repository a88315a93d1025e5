"""One engine of `serving.py` as a process: start it, let it measure, read its rows."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CACHES = ("TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")
"""The environment's names of the folders that make a start warm."""
LOG_FIGURES = {
    "weights": (r"Model loading took ([\d.]+) GiB", "GiB"),
    "kv_cache": (r"Available KV cache memory: ([\d.]+) GiB", "GiB"),
}
START_FIGURES = {
    "load": (r"load: peak \d+ bytes, ([\d.]+) s", "s"),
    "load_process": (r"FlatQuant: weights of \d+ layers ready in ([\d.]+) s", "s"),
    "load_kernels": (r"FlatQuant: \d+ kernels ready in ([\d.]+) s", "s"),
    "load_kernels_from_cache": (r"FlatQuant: \d+ kernels ready in [\d.]+ s \((\d+) from cache\)", ""),
    "compile": (r"torch.compile took ([\d.]+) s", "s"),
    "capture": (r"Graph capturing finished in ([\d.]+) secs", "s"),
}


def log_figures(log: str, alone: bool) -> Iterator[dict[str, Any]]:
    """Rows of what an engine's log says of memory and, if it started ``alone``, of the parts of the start."""
    for measure, (pattern, unit) in (LOG_FIGURES | (START_FIGURES if alone else {})).items():
        if found := re.findall(pattern, log):
            yield {"measure": measure, "value": float(found[-1]), "unit": unit}
    peaks = [int(peak) for peak in re.findall(r"load: peak (\d+) bytes", log)]
    if any(peaks):
        yield {"measure": "load_peak", "value": max(peaks) / 2**30, "unit": "GiB"}


class Engine:
    """A process that starts an engine, waits for a file ``job["go"]`` and measures. ``limit``: seconds for either."""

    def __init__(
        self, script: Path, job: dict[str, Any], log: Path, environment: dict[str, str], limit: float
    ) -> None:
        self.out, self.log, self.limit, self.problem = Path(job["out"]), log, limit, ""
        log.parent.mkdir(parents=True, exist_ok=True)
        for left_over in (self.out, Path(job["go"])):  # of a run that began in the same second
            left_over.unlink(missing_ok=True)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(job | {"begun": time.time()})],
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group: the engine core and its workers are children
            )
        self.done = self.closed = False
        self.deadline = time.monotonic() + limit

    def _wait(self) -> bool:
        """Sleep a little; False if the process has ended or its time is over."""
        if self.process.poll() is not None:
            return False
        if time.monotonic() > self.deadline:
            self.problem = f"not done after {self.limit} s"
            return False
        time.sleep(0.2)
        return True

    def wait_until_ready(self) -> None:
        """Return when the engine has started, or never will."""
        while not self.out.exists() and self._wait():
            pass

    def rows(self, start: str | None) -> Iterator[dict[str, Any]]:
        """What the engine measures, as it comes. ``start``: what its start's time is called; None if it counts not."""
        self.deadline = time.monotonic() + self.limit
        seen, running = 0, True
        while running:
            running = self._wait()
            lines = self.out.read_text().split("\n")[:-1] if self.out.exists() else []  # whole ones
            for line in lines[seen:]:
                row = json.loads(line)
                if row.get("measure") == "finished":
                    self.done = True
                    return
                if row.get("measure") == "start":
                    imports = row.pop("imports", None)
                    if start:
                        yield row | {"measure": start}
                        if imports is not None:
                            yield {"measure": "imports", "value": imports, "unit": "s"}
                    yield from log_figures(self.log.read_text(errors="replace"), bool(start))
                else:
                    yield row
            seen = len(lines)
        self.problem = self.problem or f"ended with {self.process.returncode} before it was done"

    def tail(self) -> list[str]:
        """The first lines of the log that end a traceback, where the cause is, and its last ones."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines[:-12] if re.search(r"(^|\s)[\w.]*Error: ", line)]
        return [*list(dict.fromkeys(errors))[:3], *lines[-12:]]

    def close(self) -> None:
        """End the processes and free the card's memory; those that are done get a moment to end by themselves."""
        if self.closed:
            return
        self.closed = True
        if self.done:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # once the group is empty
            for _ in range(50):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                time.sleep(0.1)
