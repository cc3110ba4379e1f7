"""Shared modules. Each imports only from rows above its own (see the table in README.md); a test enforces it."""
