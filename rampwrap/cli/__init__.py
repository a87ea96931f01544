"""The command line: one module a group of commands. Imports everything; nothing imports it."""
