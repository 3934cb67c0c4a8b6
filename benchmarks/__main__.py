"""``python -m benchmarks``: every benchmark, one table each."""

from __future__ import annotations

from benchmarks import mmcot

if __name__ == "__main__":
    mmcot.main()
