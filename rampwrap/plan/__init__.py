"""The file a deployment loads: made from a table, found in a folder, checked against a model. Imports `compare` and below; `dispatch` and above import it."""
