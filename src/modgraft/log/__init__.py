"""The research log: record it, check it, ask it questions.

The public names and their homes stand in ``__init__.pyi``. Each is imported when it is first used,
and none of them needs torch.
"""

from modgraft.core.public import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
