"""``python -m benchmarks``: every benchmark, one table each."""

from __future__ import annotations

from benchmarks import methods, mmcot, train_step

if __name__ == "__main__":
    mmcot.main()
    train_step.main()
    methods.main()
