"""x."""


class Mixed:
    """x."""

    def run(self, *a): ...
