"""Hooks by which inference engines run routing-aware configs without a changed line of theirs."""
