"""Modules elsewhere: a hub with versions, addresses, what is fetched, and lock files."""
