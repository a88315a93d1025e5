"""The commands in README.md and docs/, and how each of them is tried out.

``commands`` finds them in the bash blocks. Each is executed by ``make test`` or by ``make soak`` on the example model, or
listed in ``NOT_RUN`` with the reason.
"""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama"

NOT_RUN = {
    "make quickstart": "it makes its own environment; CI's users run it, and its parts are tested here",
    "make test": "it runs this test",
    "make test-gpu": "needs a GPU",
    "make soak": "it runs this",
    "make compare": "takes minutes to hours; tests/cpu/test_calibration_benchmarks.py runs it for one recipe",
    "flatquant quantize --out DIR --resume": "needs a run that was stopped; tests/cpu/test_resume.py has them",
    "pip install": "it would change the environment that runs this",
    "docker": "needs Docker, and a GPU to serve",
    "python -m pytest": "a part of make test",
    "TRITON_INTERPRET=1 python -m pytest": "a part of make test",
    "python benchmarks/": "takes minutes to hours; tests/cpu/test_example_accuracy.py runs the same functions",
    "vllm bench serve": "benchmarks/serving.py --serve runs it; tests/cpu/test_serving_benchmark.py has a stand-in",
    "hf upload": "needs an account",
    "flatquant eval DIR --tasks": "tests/cpu/test_tools_evaluation.py runs local tasks on both backends",
    "torchrun": "needs several GPUs; tests/cpu/test_data_parallel.py runs it on the CPU",
}
"""Start of a command -> why nothing executes it."""

CHEAP = {
    "quantize": [
        "--samples",
        "4",
        "--seq-len",
        "128",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--overwrite",
    ],
    "eval": ["--seq-len", "512", "--limit", "1", "--device", "cpu"],
    "plot": ["--samples", "2", "--seq-len", "64", "--device", "cpu"],
}
"""Options that make a command of ours quick; the last of two equal options counts."""


@dataclass(frozen=True)
class Command:
    """A command of a page: as written, without comments."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Split as a shell does."""
        return shlex.split(self.text)

    @property
    def kind(self) -> str:
        """``not run``, ``flatquant``, ``engine`` (a flatquant command that starts vLLM), ``serve``, ``python``,
        ``http`` (needs a server), or ``unknown``."""
        if any(self.text.startswith(start) for start in NOT_RUN):
            return "not run"
        words = [word for word in self.words if "=" not in word or word.startswith("-")]
        first = words[0]
        if first == "flatquant":
            backend = words[words.index("--backend") + 1] if "--backend" in words else ""
            return "engine" if backend in ("vllm", "both") or "--tasks" in words else "flatquant"
        if words[:2] == ["vllm", "serve"]:
            return "serve"
        if first == "curl" or words[:2] == ["python", "examples/client.py"]:
            return "http"
        return "python" if words[:2] == ["python", "-c"] else "unknown"


def commands(root: Path = ROOT) -> list[Command]:
    """Every command in a bash block of README.md and docs/*.md, once for each page, in their order."""
    found: dict[Command, None] = {}
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for block in re.findall(
            r"^```bash\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                text = shlex.join(shlex.split(line, comments=True))
                if text:
                    # As written where nothing but a comment is left out: joining may quote differently.
                    found[Command(file.name, _without_comment(line))] = None
    return list(found)


def _without_comment(line: str) -> str:
    """``line`` up to a comment that is not inside quotes."""
    for at in [match.start() for match in re.finditer(r"\s#", line)]:
        try:
            if shlex.split(line[:at]) == shlex.split(line, comments=True):
                return line[:at].strip()
        except ValueError:
            continue
    return line.strip()


def write_inputs(folder: Path) -> None:
    """The files that the pages name, in ``folder``."""
    import numpy as np

    text = (ROOT / "examples" / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    for name in ("text.txt", "FILE.txt", "wiki.test.raw"):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": text[i : i + 5000]}) + "\n" for i in range(0, len(text), 5000))
    )
    (folder / "c4.jsonl").write_text(
        "".join(json.dumps({"text": text[i : i + 10]}) + "\n" for i in range(0, 11_000, 10))
    )
    np.save(folder / "tokens.npy", np.arange(1024) % 2048)


def arguments(command: Command, checkpoint: Path, out: Path) -> list[str]:
    """The words of a ``flatquant`` or ``vllm`` command on the example model and ``checkpoint``; what quantize
    writes goes to ``out``."""
    words = [word for word in command.words if "=" not in word or word.startswith("-")]
    name = words[1]
    places = {"MODEL": MODEL, "DIR": out if name == "quantize" else checkpoint, "OTHER": checkpoint}
    return [str(places.get(word, word)) for word in words[1:]] + CHEAP.get(name, [])


def fitting(words: list[str]) -> list[str]:
    """Options of ``vllm serve`` for the example model: without a port, which the soak chooses, and with a
    context that the model has."""
    words = list(words)
    for option in ("--port", "--max-model-len"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return [*words, "--max-model-len", "1024"] + (
        [] if "--enforce-eager" in words else ["--enforce-eager"]
    )


def against(command: Command, address: str, checkpoint: Path) -> list[str]:
    """The words of a command that asks a server, for the one at ``address``; curl fails on an HTTP error."""
    host = address.removeprefix("http://")
    words = [
        w.replace("localhost:8000", host).replace('"DIR"', f'"{checkpoint}"') for w in command.words
    ]
    if words[0] == "python":
        return [sys.executable, str(ROOT / words[1]), *words[2:]]
    return [*words, "--fail", "--silent", "--show-error", "--noproxy", "*"]
