"""Shared modules, in levels: each imports only from lower ones (the table is in tests/test_layers.py)."""
