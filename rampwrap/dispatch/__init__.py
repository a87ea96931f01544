"""A call becomes a launch: on the host, or inside a CUDA graph. Imports `plan`, `observe` and below; `engines`, `testing` and `cli` import it."""
