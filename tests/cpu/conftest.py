"""Tests run on two cores beside others: waiting threads must not spin, and helpers are imported by name."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if shutil.which("g++") is None:
    # vLLM compiles a part of its sampler even when it is told to be eager.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
