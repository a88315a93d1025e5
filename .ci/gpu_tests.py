"""Run tests/gpu and append one row to a CSV: which GPU, versions and commit, how many passed and failed."""

import argparse
import csv
import datetime
import importlib.metadata
import platform
import sys
import time
from pathlib import Path

FIELDS = ["date", "gpu", "cuda", "python", "torch", "triton", "vllm", "commit", "tests"]
COUNTS = ["passed", "failed", "skipped", "seconds"]


class Counter:
    """A pytest plugin that counts outcomes; an error while collecting, setting up or tearing down is a failure."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report) -> None:
        self.failed += report.failed


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("pytest_args", nargs="*", default=["tests/gpu"])
    args = parser.parse_args()
    try:
        import pytest
        import torch
    except ImportError as error:
        sys.exit(f"{error}: {sys.executable} needs torch and pytest; name another Python with PYTHON=")
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible to PyTorch here; `make test` runs what needs none")

    counter, start = Counter(), time.time()
    # The cache folder may be read-only, and a run on a borrowed machine should leave nothing behind.
    status = pytest.main(
        [*args.pytest_args, "--durations=10", "-p", "no:cacheprovider"], plugins=[counter]
    )
    row = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": version("vllm"),
        "commit": args.commit,
        "tests": " ".join(args.pytest_args),
        "passed": counter.passed,
        "failed": counter.failed,
        "skipped": counter.skipped,
        "seconds": round(time.time() - start),
    }
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS + COUNTS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
