"""Kernels that write into the memory of peers: dispatch and combine among the GPUs of one host. Imported by `rampwrap.ep`."""

MOST_RANKS = 8
"Of one host, that share memory; counts of tokens are arguments of kernels, one a rank."
