"""Files that are damaged at random load as what they are or are refused; see ``mutations.py``.

``make damage`` tries 20,000; ``MUTATIONS`` says how many.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_damaged_files() -> None:
    count = os.environ.get("MUTATIONS", "300")
    command = [sys.executable, str(Path(__file__).with_name("mutations.py")), count]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout
