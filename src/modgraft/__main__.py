"""``python -m modgraft``: the command ``modgraft``."""

from modgraft.cli.app import entry

if __name__ == "__main__":
    entry()
