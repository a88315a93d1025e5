"""A `vllm serve` process of one's own: started on a free local port, waited for, and stopped with its children."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A running server. ``address`` is ``http://host:port``; ``start_seconds`` is what it took to be ready."""

    address: str
    pid: int
    log: Path
    start_seconds: float


def vllm_command() -> list[str]:
    """The ``vllm`` command of the running Python, which may be installed without its script."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@contextlib.contextmanager
def serve(
    model: str | Path,
    *options: str,
    log: Path,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
    vllm: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve ``model`` with ``options`` of ``vllm serve``; its output goes to ``log``.

    timeout: seconds to become ready. env: added to this process's environment. vllm: a command in place of
    ``vllm``. Raises RuntimeError if the server ends or is not ready in time; the end of its log is shown if anything fails inside the block.
    """
    port = _free_port()
    at = ["--host", "127.0.0.1", "--port", str(port)]
    command = [*(vllm or vllm_command()), "serve", str(model), *at, *options]
    print("$", "vllm", *command[command.index("serve") :], f"  (log: {log})", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as log_file:
        process = subprocess.Popen(
            command,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_until_healthy(process, address, timeout)
            yield Server(address, process.pid, log, time.monotonic() - start)
        except Exception:
            log_file.flush()
            lines = log.read_text(errors="replace").splitlines()
            print(f"\n-- the end of {log}:", *lines[-60:], sep="\n", file=sys.stderr, flush=True)
            raise
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Interrupt the server, then kill what is left of its process group: vLLM's engine is its child."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(50):
            os.killpg(server.pid, 0)
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {timeout:.0f} s")
