"""Our Triton kernels. Imported by adapters and by graph dispatch."""
