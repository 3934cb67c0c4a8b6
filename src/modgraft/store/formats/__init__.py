"""Other tools' formats, each a folder here."""
