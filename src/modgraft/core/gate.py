"""Lets calls of a host run beside each other, and changes of it only while none runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modgraft.core.errors import ModgraftError


class Gate:
    """Calls enter it, ``with gate:``; a change waits for those inside, and holds off the others.

    A call within a call, in the same thread, enters at once. A copy of a host has a gate of its
    own.

    Attributes:
        turn: the lock for what takes no longer than an assignment.
    """

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self._inside: dict[int, int] = {}  # how many calls of each thread are inside
        self._waiting = 0  # changes under way, and those that wait
        self._changing: int | None = None  # the thread whose change is under way

    def __reduce__(self) -> tuple[Callable[[], Gate], tuple[()]]:
        return Gate, ()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self.turn:
            if me not in self._inside and me != self._changing:
                while self._waiting:
                    self.turn.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self.turn:
            left = self._inside.pop(me) - 1
            if left:
                self._inside[me] = left
            elif self._waiting:
                self.turn.notify_all()

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Wait for the calls inside to end, and hold off others in a ``with`` block.

        Args:
            what: the change, for the error.

        Raises:
            ModgraftError: inside a call of this thread, which would wait for itself.
        """
        me = threading.get_ident()
        if self._changing == me:  # a part of another change
            yield
            return
        with self.turn:
            if me in self._inside:
                raise ModgraftError(
                    f"{what} within a call of this host, as in a hook or a callback: a call sees "
                    f"one state of the host from its beginning to its end; do it when it has ended"
                )
            self._waiting += 1
            try:
                while self._inside or self._changing is not None:
                    self.turn.wait()
            except BaseException:  # Ctrl-C while waiting
                self._leave()
                raise
            self._changing = me
        try:
            yield
        finally:
            with self.turn:
                self._changing = None
                self._leave()

    def _leave(self) -> None:
        self._waiting -= 1
        self.turn.notify_all()
