"""Compile kernels before they are needed, in other processes, into Triton's cache on disk.

Triton holds the interpreter's lock while it compiles, so threads gain nothing. One helper process imports PyTorch and
Triton once and forks as many workers as there are cores for; none of them touches a GPU, and none outlives the process
that asked. What a worker cannot compile the process that needs it compiles itself, or fails to with Triton's own error.

A variant is a line of JSON. A file in the cache that is named after the line and the sources says that it is there,
and is locked while a process compiles it: those of several ranks share the work, as each takes first what is not locked.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from . import jit

MOST_WORKERS = 8
"""Of all ranks of a host; each worker takes up to 0.5 GB of its memory."""
LIMIT = 300.0
"""Seconds after which workers are given up."""


def describe(kernel: Any, args: Sequence[Any], meta: dict[str, Any]) -> str:
    """The variant that ``jit.launch`` of these arguments on the current GPU needs."""
    target = jit.triton.runtime.driver.active.get_current_target()
    return json.dumps(
        {
            "kernel": [kernel.fn.__module__, kernel.fn.__name__],
            "args": [
                _encoded(argument, not parameter.do_not_specialize)
                for argument, parameter in zip(args, kernel.params, strict=False)
            ],
            "meta": meta,
            "target": [target.backend, target.arch, target.warp_size],
        }
    )


def _encoded(argument: Any, specialize: bool) -> Any:
    """What Triton looks at, and no more: variants that are one have one line."""
    if isinstance(argument, torch.Tensor):
        return ["tensor", _name(argument), argument.data_ptr() % 16 == 0]
    if hasattr(argument, "block_shape"):
        return ["box", _name(argument.base), *argument.block_shape, argument.layout.swizzle_byte_width]
    if isinstance(argument, int):
        wide = 2**32 * (argument.bit_length() > 31)
        known = argument if argument == 1 else 16 if argument % 16 == 0 else 7
        return wide + (known if specialize else 7)
    return type(argument)(1)


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _decoded(value: Any) -> Any:
    """An argument that asks for the same variant, on the CPU."""
    if not isinstance(value, list):
        return value
    kind, name, *rest = value
    memory = torch.empty(32, dtype=getattr(torch, name))
    if kind == "tensor":
        return memory if rest[0] else memory[1:]
    from .hopper_gluon import descriptor

    rows, columns, swizzle = rest
    return descriptor(memory, rows, columns, rows, columns, swizzle)


class Outcome(NamedTuple):
    """How many variants the workers compiled, and a sentence for each failure."""

    compiled: int
    problems: list[str]


class Ahead:
    """The helper process, while there is one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._sent: set[str] = set()
        self._problems: list[str] = []

    def submit(self, variants: Sequence[str], ranks: int = 1) -> None:
        """Begin to compile those that are not in the cache. Does not wait and does not raise.

        ranks: how many processes of this host do so at the same time.
        """
        try:
            fresh = [v for v in dict.fromkeys(variants) if v not in self._sent]
            missing = [v for v in fresh if not _there(_mark(v))]
            if not missing or not sys.executable:
                return
            if self._process is None:
                self._process = _start(worker_count(ranks))
            self._sent |= set(missing)
            assert self._process.stdin is not None
            self._process.stdin.write("".join(f"{variant}\n" for variant in missing))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the helper has ended, and ``wait`` says why, once
        except (OSError, AttributeError) as error:  # AttributeError: a Triton without these settings
            self._problems.append(f"kernels cannot be compiled in other processes ({error})")

    def wait(self, limit: float = LIMIT) -> Outcome:
        """Return when all is compiled, the helper has ended or ``limit`` seconds are over."""
        process, self._process = self._process, None
        problems, self._problems = self._problems, []
        self._sent = set()
        if process is None:
            return Outcome(0, problems)
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end_group(process.pid)
            out, err = process.communicate()
            problems.append(f"other processes did not compile all kernels in {limit:.0f} s")
        else:
            if process.returncode:
                _end_group(process.pid)  # a compiler that a worker has started
                lines = [line for line in err.splitlines() if re.match(r"[\w.]+: ", line)]
                reason = lines[-1][:300] if lines else f"status {process.returncode}"
                problems.append(f"the process that compiles kernels failed ({reason})")
        answers = [line.partition(" ") for line in out.splitlines()]
        problems += dict.fromkeys(rest for kind, _, rest in answers if kind == "failed")
        return Outcome(sum(kind == "compiled" for kind, _, _ in answers), problems)


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def worker_count(ranks: int) -> int:
    """How many workers a process has, of ``ranks`` on this host."""
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0))) // ranks)


_HELPER = (
    "import sys; module, workers, parent, *sys.path[:] = sys.argv[1:]; "
    "__import__(module, fromlist=['main']).main(int(workers), int(parent))"
)


def _start(workers: int) -> "subprocess.Popen[str]":
    # Modules come from where this process has them; ``-m`` would look in the working directory first.
    return subprocess.Popen(
        [sys.executable, "-c", _HELPER, __name__, str(workers), str(os.getpid()), *sys.path],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its workers can be ended with it
    )


@cache
def _sources() -> bytes:
    """What a compiled kernel depends on beside its arguments."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return b"".join([jit.triton.__version__.encode(), *[file.read_bytes() for file in files]])


def _mark(variant: str) -> Path:
    name = hashlib.sha256(_sources() + variant.encode()).hexdigest()
    return Path(jit.triton.knobs.cache.dir) / "flatquant" / name


def _there(mark: Path) -> bool:
    return mark.exists() and mark.stat().st_size > 0


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[TextIO | None]:
    """The file, to append to, in one process at a time (where the file system has locks); None if another has it and
    not ``wait``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        except OSError:
            pass
        yield file if mine else None


class _NoDevice:
    """A Triton driver that only knows what to compile for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


BUSY = "busy"
"""The answer where another process compiles the same."""


def compile_variant(variant: str, wait: bool = True) -> str:
    """In a worker: compile what ``describe`` described, unless it is there. Returns the line that answers.

    wait: for another process that compiles the same; else the answer is ``BUSY``.
    """
    mark, what = _mark(variant), json.loads(variant)
    module, name = what["kernel"]
    try:
        with _locked(mark, wait) as file:
            if file is None:
                return BUSY
            if _there(mark):
                return "there"
            from triton.backends.compiler import GPUTarget

            jit.triton.runtime.driver.set_active(_NoDevice(GPUTarget(*what["target"])))
            kernel = getattr(import_module(module), name)
            compiled = kernel.warmup(*map(_decoded, what["args"]), grid=(1,), **what["meta"])
            _build_launcher(compiled)
            file.write("compiled\n")
        return "compiled"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is met again where the kernel is needed
        return f"failed a worker did not compile {name}: {type(error).__name__}: {error}".replace(
            "\n", " "
        )[:400]


def _build_launcher(compiled: Any) -> None:
    """Triton 3.6 has a C compiler make a launcher for each signature, later ones have one launcher."""
    with contextlib.suppress(Exception):  # it is made again, and fails again, where the kernel starts
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(compiled.src, compiled.metadata)


def _end_with(parent: int, number: int) -> None:
    """Have this process get the signal ``number`` when its parent ends (on Linux). parent: its process id."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it had ended before
            os.kill(os.getpid(), number)


def _begin_worker(helper: int) -> None:
    """What ``wait`` reads ends with the helper: neither a worker nor a compiler that it starts keeps it open."""
    _end_with(helper, signal.SIGKILL)
    with open(os.devnull, "w") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)


def main(workers: int, parent: int) -> None:
    """The helper: a variant on each line of standard input, an answer on each line of standard output.

    parent: the process that started it. When that is killed nobody else ends a worker or a compiler that hangs, so the
    helper ends its group. When the helper is killed, its workers end: idle, they would wait for ever.
    """
    _end_with(parent, signal.SIGUSR1)
    import_module(".chain", __package__)  # workers are forked, and need not import again
    for gluon in ("w4_gemm_hopper", "silu_mul_kron_quant_hopper"):
        jit.has_gluon(gluon)
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
    with ProcessPoolExecutor(workers, get_context("fork"), _begin_worker, (os.getpid(),)) as pool:
        asked = [(line, pool.submit(compile_variant, line, False)) for line in map(str.strip, sys.stdin)]
        busy = []
        for line, answer in asked:
            if answer.result() == BUSY:
                busy.append(line)
            else:
                print(answer.result(), flush=True)
        for answer in [pool.submit(compile_variant, line) for line in busy]:
            print(answer.result(), flush=True)
