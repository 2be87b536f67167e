"""Fixtures of the log's tests."""

from __future__ import annotations

import sys
from pathlib import Path

# The twin reader and the generator stand beside the tests.
sys.path.insert(0, str(Path(__file__).parent))
