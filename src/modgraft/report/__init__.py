"""Report a run: a self-contained HTML page, its figures, and tables.

The public names and their homes stand in ``__init__.pyi``; each is imported when it is first used,
so that reading a run's predictions waits for no plots.
"""

from modgraft.core.public import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
