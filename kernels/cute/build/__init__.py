"""Compiles, inspects, links and loads the kernels."""
