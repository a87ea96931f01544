"""For authors of kernels: the conformance suite and a simulated kernel. Imports `dispatch` and below; nothing but `cli` and tests imports it."""
