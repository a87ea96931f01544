"""Experts spread over ranks: which rank holds which. Imports `plan` and below; `cli` imports it."""
