"""``flatquant eval`` as a user runs it: in a process of its own, which may start an engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def evaluate(
    folder: Path, *options: object, environment: dict[str, str] | None = None
) -> tuple[Any, str]:
    """What the last line of ``flatquant eval FOLDER OPTIONS --json`` holds, and all that it printed."""
    command = [sys.executable, "-m", "vllm_flatquant.cli", "eval", str(folder), *map(str, options)]
    done = subprocess.run(
        [*command, "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stdout
