"""Tests run on two cores beside others: waiting threads must not spin, and helpers are imported by name."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
