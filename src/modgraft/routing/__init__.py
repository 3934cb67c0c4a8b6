"""Routing functions: which modules act, and how strongly."""

from modgraft.routing import base, fixed, learned, losses, zero_shot

__all__ = ["base", "fixed", "learned", "losses", "zero_shot"]
