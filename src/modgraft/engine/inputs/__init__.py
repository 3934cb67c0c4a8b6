"""Tokens, and keys and values of attention, that modules put before what a host reads."""
