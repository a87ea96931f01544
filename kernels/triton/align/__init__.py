"""Expert ids into M blocks of one expert each."""
