"""Hooks for inference engines, and what they need before the first step. Imports everything but `cli`; engines do not know each other."""
