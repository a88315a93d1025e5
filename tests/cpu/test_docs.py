"""Every command in README.md and docs/ is executed here, in `make soak`, or listed with the reason why not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_folders import squeezebits
from tiny_model import make_model

from ..soak.documents import (
    MODEL,
    NOT_RUN,
    ROOT,
    Command,
    arguments,
    commands,
    write_inputs,
)

ALL = commands()
OURS = {command.text: command for command in ALL if command.kind == "flatquant"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that the pages name and a checkpoint of two shards."""
    from vllm_flatquant.calibration.quantize import quantize
    from vllm_flatquant.calibration.recipe import make_recipe

    folder = tmp_path_factory.mktemp("docs")
    write_inputs(folder)
    squeezebits(make_model(folder / "small"), folder / "SOURCE", True)
    recipe = make_recipe(samples=4, seq_len=128, epochs=0, shards=2)
    quantize(MODEL, folder / "checkpoint", recipe, str(folder / "text.txt"), "cpu")
    return folder


def test_every_command_is_run_or_listed_with_a_reason():
    assert len(ALL) > 30
    unknown = [f"{command.page}: {command.text}" for command in ALL if command.kind == "unknown"]
    assert not unknown, f"run these in tests/soak/documents.py, or list them with a reason: {unknown}"
    idle = [start for start in NOT_RUN if not any(c.text.startswith(start) for c in ALL)]
    assert set(idle) <= {"hf upload", "make soak"}, "reasons for commands that no page has"


@pytest.mark.parametrize("command", OURS.values(), ids=OURS)
def test_command_of_ours_works(command: Command, place, tmp_path, run, monkeypatch):
    monkeypatch.chdir(place)
    words = arguments(command, place / "checkpoint", tmp_path / "out")
    if "--verify" in words:
        words += ["--backend", "reference"]  # `make soak` replays through vLLM as well
    if "--out" in words and words[0] != "quantize":
        words[words.index("--out") + 1] = str(tmp_path / "out")
    if "--resume" in words:
        interrupt(tmp_path / "out")
    status, out, err = run(*words)
    assert status == 0, err
    assert out.strip()
    if "--out" in words and "--dry-run" not in words:
        assert (tmp_path / "out" / "config.json").exists()


def interrupt(out: Path) -> None:
    """Leave a run to ``out`` after its first block, with the settings that ``arguments`` adds."""
    from vllm_flatquant.calibration.quantize import Callbacks, quantize
    from vllm_flatquant.calibration.recipe import make_recipe

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe = make_recipe(samples=4, seq_len=128, epochs=1)
        quantize(MODEL, out, recipe, "stdlib", "cpu", callbacks=Callbacks(block=stop))


SERVED = {command.text: command for command in ALL if command.kind == "serve"}


@pytest.mark.parametrize("command", SERVED.values(), ids=SERVED)
def test_options_of_vllm_serve_are_accepted(command: Command, place, monkeypatch):
    """The options as vLLM parses them, and its configuration with our checks; `make soak` serves."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # where older versions have it
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_flatquant.config import FlatQuantConfig

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    words = arguments(command, place / "checkpoint", place / "unused")
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words[1:])
    parsed.model = parsed.model_tag or parsed.model
    parsed.max_model_len = min(parsed.max_model_len or 1024, 1024)  # what the example model can
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    assert isinstance(config.quant_config, FlatQuantConfig)


@pytest.mark.parametrize("command", [c for c in ALL if c.kind == "python"], ids=lambda c: c.text)
def test_python_one_liners_work(command: Command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, *command.words[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not registered" not in done.stderr


def test_pages_that_are_named_exist():
    """Links and file names of this repository in the pages."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        named = re.findall(
            r"`((?:docs|tests|kernels|calibration|benchmarks|examples|vllm_flatquant)/[\w/.-]+)`", text
        )
        missing = [name for name in named if not (ROOT / name).exists()]
        assert not missing, f"{page.name} names {missing}"
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_comments_and_quotes_are_told_apart(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        '```bash\n# alone\nmake x   # why\ncurl a -d \'{"b": "# no comment"}\'\none \\\n  two  # three\n```\n'
        "```python\nnot this\n```\n"
    )
    found = [c.text for c in commands(tmp_path)]
    assert found[:2] == ["make x", 'curl a -d \'{"b": "# no comment"}\'']
    assert found[2].split() == ["one", "two"]
    assert {c.kind for c in commands(tmp_path)} == {"unknown", "http"}


def test_reasons_are_sentences_and_the_example_exists():
    assert all(len(reason.split()) >= 3 for reason in NOT_RUN.values())
    assert Path(MODEL / "config.json").exists()


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("quantize", ("calibration rows [preset or recipe]", "qronos", "w8a8")),
        ("eval", ("tokens per window [2048]", "examples [the task's]")),
        ("plot", ("[the middle one]", "[FOLDER/plots]")),
    ],
)
def test_help_says_what_holds_without_an_option(run, command, parts):
    _, out, _ = run(command, "--help")
    text = " ".join(out.split())
    assert all(part in text for part in parts), text
