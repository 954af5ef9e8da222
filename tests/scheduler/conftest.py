"""The scheduler's tests run on the simulation."""

from __future__ import annotations

import sys
from pathlib import Path

# Test modules are imported one by one (importlib mode); what they share lies beside them.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "sim")]
