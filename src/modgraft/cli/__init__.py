"""The command line.

Files with commands do not begin with ``from __future__ import annotations``: typer evaluates the
annotations of every command at each start, twice, and as text that takes a tenth of ``--help``.
"""
