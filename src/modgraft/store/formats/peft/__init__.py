"""PEFT's folders: what reads them and what writes them, each kind of module a file."""
