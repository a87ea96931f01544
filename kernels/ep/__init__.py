"""Kernels that write into the memory of peers: dispatch and combine among the GPUs of one host. Imported by `rampwrap.ep`."""
