"""The contract that every method keeps, for a method of your own: ``check(MyMethod())``."""

from modgraft.testing.contract import Report, check

__all__ = ["Report", "check"]
