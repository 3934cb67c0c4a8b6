"""The research log: record it, check it, ask it questions.

The public names and their homes stand in ``__init__.pyi``. Each is imported when it is first used,
and none of them needs torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
