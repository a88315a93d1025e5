"""Quantize examples/tiny-llama to W4A4, measure it, serve it with `vllm serve` and ask it two questions.

`make quickstart` runs this with the Python of .venv, which must hold vLLM and this package.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from client import complete, stream  # beside this script
from openai import OpenAI

from vllm_flatquant.tools.server import serve

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


def serve_options() -> list[str]:
    """Options of `vllm serve` for the example model."""
    options = ["--quantization", "flatquant", "--served-model-name", "tiny-llama"]
    options += ["--max-model-len", "1024", "--max-num-seqs", "8"]
    # On a CPU compilation takes a minute and a C++ compiler, which so small a model does not repay.
    return [*options, "--enforce-eager"] if "cpu" in version("vllm") else options


def again(out: Path) -> list[str]:
    """Commands that a user's own shell needs to serve ``out``."""
    activate = BIN / "activate"
    enter = [f"source {os.path.relpath(activate)}"] if activate.exists() else []
    return [*enter, shlex.join(["vllm", "serve", str(out), *serve_options()])]


def ask(address: str) -> None:
    """One completion and one streamed chat completion through the `openai` client."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)
    prompt = "import os\n\ndef read_file(path):\n"
    text = complete(client, "tiny-llama", prompt, 48)
    if not text:
        raise RuntimeError("the completion is empty")
    print(f"\n-- completion\n{prompt}{text}")

    question = "Return the names of the files in a directory."
    print(f"\n-- chat completion, streamed\n# {question}")
    if not stream(client, "tiny-llama", question, 48):
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
        log = args.out.parent / "quickstart-server.log"
        env = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        with serve(args.out, *serve_options(), log=log, timeout=args.timeout, env=env) as server:
            ask(server.address)
    except RuntimeError as error:
        sys.exit(f"quick start: {error}")
    print(
        f"\n== Done in {time.monotonic() - started:.0f} s; the checkpoint is in {args.out}. To serve it again:"
    )
    print("\n".join(again(args.out)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("quick start: interrupted")
