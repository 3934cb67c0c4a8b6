"""The research log: an index of notes that can also be asked in words."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from modgraft.log.index.database import WAIT
from modgraft.log.index.index import Index
from modgraft.log.index.vectors import Vectors

if TYPE_CHECKING:
    from modgraft.log.ask.answer import Answer
    from modgraft.log.ask.names import Names
    from modgraft.log.index.indexer import Indexed
    from modgraft.log.settings import Settings


class Log(Index):
    """Notes in folders, with an index to query and questions to ask in plain English.

        log = Log.open("notes")
        log.index()                            # what changed since the last time
        log.query(actions="skim", status="full_read")
        log.ask("what are my open questions?")

    The text in every result is read from the notes again: a note that changed since it was indexed
    is first indexed again, and results from a deleted note are left out. Only ``index()`` finds
    new notes; a log that was never indexed is indexed by the first query. ``indexed`` is the report
    of the last indexing.
    """

    def __init__(self, settings: Settings, wait: float = WAIT) -> None:
        super().__init__(settings, wait)
        self.vectors = Vectors(self.database, settings.index.parent)

    def index(self, *, anew: bool = False, vectors: bool | None = None) -> Indexed:
        """Bring the index up to date.

        Args:
            anew: Build it from nothing.
            vectors: Compute the vectors for free questions too; left out, as the project says.

        Raises:
            VectorsOffError: if vectors are asked for and their model is not installed.
            ModgraftError: if not every note that was seen is in the index.
            LockedIndexError: if another process keeps writing.
        """
        done = self.update(anew=anew)
        if self.settings.vectors if vectors is None else vectors:
            self.vectors.update()
        return done

    def names(self) -> Names:
        """Return the names by which a question may refer to the notes and the sources."""
        from modgraft.log.ask.names import names_of

        return names_of(self)

    def ask(self, question: str, *, today: date | None = None) -> Answer:
        """Answer a question with the lines that support the answer, or say why there is none.

        Args:
            question: In plain English; `modgraft.log.ask.ask.ROUTES` lists the kinds of questions.
            today: What "last week" is counted from; left out, the current day.

        Raises:
            ModgraftError: a question without a word.
        """
        # Imported when first used: compiling the table of questions takes longer than a query.
        from modgraft.log.ask.ask import ask

        day = today or date.today()
        return self.recovering(lambda: ask(self, self.vectors, question, day))
