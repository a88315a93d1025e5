"""Quantize examples/tiny-llama to W4A4, measure it, serve it with `vllm serve` and ask it two questions.

`make quickstart` runs this with the Python of .venv, which must hold vLLM and this package.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("examples/tiny-llama")
HELD_OUT = Path("examples/heldout.txt")
BIN = Path(sys.executable).parent


def announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: str) -> str:
    """Run a command, show what it prints and return it; a failure ends the quick start."""
    print("$", *(Path(command[0]).name, *command[1:]), flush=True)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        output = ""
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                output += line
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        sys.exit(
            f"quick start: {Path(command[0]).name} {command[1]} ended with status {process.returncode}"
        )
    return output


def perplexity(model: Path, windows: int) -> float:
    limit = ["--limit", str(windows)] if windows else []
    output = run(
        *(str(BIN / "flatquant"), "eval", str(model), "--text", str(HELD_OUT)),
        *("--seq-len", "1024", "--json", *limit),
    )
    return json.loads(output.strip().splitlines()[-1])["perplexity"]


def size_mb(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(server: subprocess.Popen) -> None:
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


def wait_until_healthy(server: subprocess.Popen, url: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {timeout:.0f} s")


@contextlib.contextmanager
def serve(checkpoint: Path, log: Path, timeout: float) -> Iterator[str]:
    """`vllm serve` on a free local port; yields its address. Its log's end is shown if anything fails."""
    port = free_port()
    command = [
        *(str(BIN / "vllm"), "serve", str(checkpoint), "--quantization", "flatquant"),
        *("--served-model-name", "tiny-llama", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "1024", "--max-num-seqs", "8"),
    ]
    # On a CPU compilation takes a minute and a C++ compiler, which so small a model does not repay.
    if "cpu" in version("vllm"):
        command.append("--enforce-eager")
    print("$", "vllm", *command[1:], f"  (log: {log})", flush=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as log_file:
        server = subprocess.Popen(
            command,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}", timeout)
            yield f"http://127.0.0.1:{port}"
        except Exception:
            log_file.flush()
            lines = log.read_text(errors="replace").splitlines()
            print(f"\n-- the end of {log}:", *lines[-60:], sep="\n", file=sys.stderr, flush=True)
            raise
        finally:
            stop(server)


def ask(address: str) -> None:
    """One completion and one streamed chat completion through the `openai` client."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)
    prompt = "import os\n\ndef read_file(path):\n"
    completion = client.completions.create(
        model="tiny-llama", prompt=prompt, max_tokens=48, temperature=0
    )
    text = completion.choices[0].text
    if not text:
        raise RuntimeError("the completion is empty")
    print(f"\n-- completion\n{prompt}{text}")

    question = "Return the names of the files in a directory."
    stream = client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    print(f"\n-- chat completion, streamed\n# {question}")
    pieces = 0
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            print(piece, end="", flush=True)
            pieces += 1
    print()
    if not pieces:
        raise RuntimeError("the streamed chat completion is empty")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument(
        "--windows", type=int, default=0, help="evaluate on so many windows only; 0 means all"
    )
    parser.add_argument(
        "--timeout", type=float, default=240, help="seconds the server may take to start"
    )
    args = parser.parse_args()
    # SIGTERM must unwind the stack as Ctrl-C does, or the server would outlive this script.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    os.chdir(ROOT)
    for program in ("flatquant", "vllm"):
        if shutil.which(str(BIN / program)) is None:
            sys.exit(f"quick start: {BIN / program} is missing; `make quickstart` installs it")
    started = time.monotonic()

    announce("Quantize to W4A4. The quick preset is reduced: few samples, few epochs")
    run(
        *(str(BIN / "flatquant"), "quantize", str(MODEL), "--out", str(args.out), "--scheme", "w4a4"),
        *("--preset", "quick", "--calib", "stdlib", "--overwrite"),
    )

    announce(f"Perplexity on {HELD_OUT}, before and after")
    before, after = perplexity(MODEL, args.windows), perplexity(args.out, args.windows)
    print(f"\n{'':12}{'perplexity':>12}{'weights on disk':>18}")
    print(f"{'bf16':12}{before:>12.3f}{size_mb(MODEL):>15.2f} MB")
    print(f"{'W4A4':12}{after:>12.3f}{size_mb(args.out):>15.2f} MB")

    announce("Serve it with vLLM")
    try:
        with serve(args.out, args.out.parent / "quickstart-server.log", args.timeout) as address:
            ask(address)
    except RuntimeError as error:
        sys.exit(f"quick start: {error}")
    print(f"\n== Done in {time.monotonic() - started:.0f} s; the checkpoint is in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("quick start: interrupted")
