"""modgraft: implant, compose, train and share modules in a frozen host model.

The public names and their homes stand in ``__init__.pyi``. Each is imported when it is first used:
what needs no torch does not wait for it.
"""

from modgraft.core.public import attach_stub

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
