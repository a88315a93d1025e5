"""Run tests/gpu and append one row to a CSV: which GPUs, versions and commit, how many passed and failed.

With pytest-xdist several processes share each GPU, the longest tests first; without it one test follows another.
A failure is printed when it happens. A run that is stopped, by --deadline or SIGTERM, says in its row that it was.
"""

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIELDS = ["date", "gpu", "cuda", "python", "torch", "triton", "vllm", "commit", "tests"]
COUNTS = ["passed", "failed", "skipped", "seconds"]
WORKERS = 16
"""Most processes for one GPU: a test and the engine that it starts take 1 to 5 GB of its memory."""
SHARE = 0.1
"""Of a GPU's memory, what the process of a test itself may allocate where several share the GPU."""
LONG = 50.0
SECONDS = {
    "test_server_under_mixed_requests[w4a4]": 240.0,
    "test_server_under_mixed_requests": 150.0,
    "test_perplexity_and_greedy_tokens_are_the_references[w4a4": 140.0,
    "test_perplexity_and_greedy_tokens_are_the_references": 120.0,
    "test_fusion_changes_speed_only": 110.0,
    "test_verify_passes": 80.0,
    "test_engine_follows_the_reference": 60.0,
    "test_same_bytes_after_an_interruption": 25.0,
    "test_a_dry_run_foretells_the_memory": 20.0,
    "test_kron_quant": 12.0,
    "test_layers_follow_the_references": 10.0,
    "test_block_training": 10.0,
}
"""About what a test takes, the first that its name begins with; any other test 5 s. Only the order depends on it."""


def expected_seconds(test: str) -> float:
    """For a test's id, ``path::name[case]``."""
    name = test.rpartition("::")[2]
    return next((seconds for begin, seconds in SECONDS.items() if name.startswith(begin)), 5.0)


def scheduler(config: Any, log: Any) -> Any:
    """xdist's scheduling, but the longest test left goes first.

    A worker always holds the test that comes after the one it runs. Where that one is long, the shortest test
    left is what waits behind it, so that no long test waits while other workers are free.
    """
    from xdist.scheduler import LoadScheduling

    class LongestFirst(LoadScheduling):
        def _send_tests(self, node: Any, num: int) -> None:
            def cost(index: int) -> float:
                return expected_seconds(self.collection[index])

            for _ in range(min(num, len(self.pending))):
                held = self.node2pending[node]
                behind_a_long_one = bool(held) and cost(held[-1]) >= LONG
                chosen = (min if behind_a_long_one else max)(self.pending, key=cost)
                self.pending.remove(chosen)
                self.pending.insert(0, chosen)
                super()._send_tests(node, 1)

    return LongestFirst(config, log)


class Results:
    """A pytest plugin of the process that reports: the outcome of each test, and failures as they happen.

    An error while collecting, setting up or tearing down is a failure, and so is a worker that dies.
    """

    def __init__(self, shown: int = 6000) -> None:
        """shown: characters of each failure, its end, that are printed."""
        self.shown = shown
        self.tests: set[str] = set()
        self.running: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def count(self, outcome: str) -> int:
        """Finished tests with this outcome: passed, failed or skipped."""
        return sum(found == outcome for found in self.outcomes.values())

    @property
    def missing(self) -> int:
        """Tests that were collected and have no outcome."""
        return len(self.tests - self.outcomes.keys())

    def pytest_configure(self, config: Any) -> None:
        self.plugins = config.pluginmanager

    def pytest_collection_finish(self, session: Any) -> None:
        self.tests.update(item.nodeid for item in session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.add(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration
        if report.failed:
            self._failed(report)
        elif report.skipped and self.outcomes.get(test) != "failed":
            self.outcomes[test] = "skipped"
        # Passed only when it is taken down: what is cut off before was not seen to pass.
        elif report.when == "teardown":
            self.outcomes.setdefault(test, "passed")
        if report.when == "call":
            for name, value in report.user_properties:
                self._print(f"{name}: {value}")
        if report.when not in ("setup", "call"):
            self.running.discard(test)
            if self.seconds[test] >= LONG and self.outcomes[test] == "passed":
                self._print(f"passed in {self.seconds[test]:.0f} s: {test}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and report.nodeid not in self.outcomes:
            self._failed(report)

    def _failed(self, report: Any) -> None:
        self.outcomes[report.nodeid] = "failed"
        captured = "".join(text[-self.shown // 3 :] for _, text in report.sections)
        self._print(
            f"FAILED {report.nodeid}\n{captured}\n{report.longreprtext[-self.shown :]}\n(end of {report.nodeid})"
        )

    def _print(self, text: str) -> None:
        self.plugins.get_plugin("terminalreporter").write(f"\n{text}\n", flush=True)


class ParallelResults(Results):
    """The same where xdist's workers collect and run."""

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.tests.update(ids)

    def pytest_xdist_make_scheduler(self, config: Any, log: Any) -> Any:
        return scheduler(config, log)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def visible_gpus(count: int) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; by default 0, 1, ... of ``count``."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in given.split(",") if name] or [str(i) for i in range(count)]


def stop_at(deadline: float | None) -> None:
    """Have SIGTERM, and SIGALRM after ``deadline`` seconds, end the tests and all that they have started."""

    def stop(*_: Any) -> None:
        with contextlib.suppress(ImportError):
            import psutil

            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    if deadline:
        signal.setitimer(signal.ITIMER_REAL, deadline)


def run_tests(arguments: list[str], gpus: list[str], workers: int) -> tuple[Results, int]:
    """Run pytest with ``arguments``; what it found and its exit status. workers: 0 runs in this process."""
    import pytest

    # The cache folder may be read-only, and a run on a borrowed machine should leave nothing behind.
    options = ["--no-summary", "-p", "no:cacheprovider"]
    results: Results = Results()
    if workers:
        os.environ["FLATQUANT_TEST_GPUS"] = ",".join(gpus)
        os.environ.setdefault("FLATQUANT_TEST_GPU_SHARE", str(SHARE))
        # More processes than cores as it is: threads would only wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        options += ["-n", str(workers), "--dist=load", "--maxschedchunk=1"]
        results = ParallelResults()
    status = pytest.main([*arguments, *options], plugins=[results])
    signal.setitimer(signal.ITIMER_REAL, 0)
    return results, int(status)


def row_of(results: Results, status: int, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """What was run and how it ended: the columns ``tests`` and COUNTS."""
    tests = " ".join(arguments)
    if results.missing:
        tests += f" (cut off after {seconds:.0f} s, {results.missing} of {len(results.tests)} without a result)"
    elif status not in (0, 1):
        tests += f" (pytest ended with status {status})"
    return {
        "tests": tests,
        **{outcome: results.count(outcome) for outcome in COUNTS[:3]},
        "seconds": round(seconds),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to the CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS + COUNTS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--gpus", type=int, help="use only the first so many [all that are visible]")
    parser.add_argument(
        "--workers-per-gpu", type=int, help=f"0: one test after another [the cores, at most {WORKERS}]"
    )
    parser.add_argument("--deadline", type=float, help="stop after so many seconds")
    parser.add_argument("pytest_args", nargs="*", default=["tests/gpu"])
    args = parser.parse_args()
    start = time.time()
    stop_at(args.deadline)
    try:
        import pytest  # noqa: F401
        import torch
    except ImportError as error:
        sys.exit(f"{error}: {sys.executable} needs torch and pytest; name another Python with PYTHON=")
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible to PyTorch here; `make test` runs what needs none")

    gpus = visible_gpus(torch.cuda.device_count())[: args.gpus]
    each = args.workers_per_gpu
    if each is None:
        each = max(1, min(WORKERS, len(os.sched_getaffinity(0)) // len(gpus)))
    if importlib.util.find_spec("xdist") is None:
        each = 0
    results, status = run_tests(args.pytest_args, gpus, each * len(gpus))
    row = {
        "date": datetime.date.today().isoformat(),
        "gpu": f"{len(gpus)} x " * (len(gpus) > 1) + torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": version("vllm"),
        "commit": args.commit,
        **row_of(results, status, args.pytest_args, time.time() - start),
    }
    append(args.csv, row)
    slowest = sorted(results.seconds.items(), key=lambda item: -item[1])[:10]
    print(*(f"{seconds:.0f} s  {test}" for test, seconds in slowest), sep="\n")
    for word, tests in (
        ("FAILED", {t for t, outcome in results.outcomes.items() if outcome == "failed"}),
        ("was running:", results.running),
    ):
        print(*(f"{word} {test}" for test in sorted(tests)), sep="\n")
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return status or bool(results.missing)


if __name__ == "__main__":
    raise SystemExit(main())
