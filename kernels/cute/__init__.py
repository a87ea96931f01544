"""Our CuTe DSL kernels for sm_90a. Imported by their adapter and the command that builds them."""
