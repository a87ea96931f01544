"""Policies judged by measured times, and the tables and pictures of it. Imports `policy` and below; `plan`, `cli` and users import it."""
