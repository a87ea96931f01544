"""Experts spread over ranks: which rank holds which, and how tokens reach them and come back summed.

Imports `dispatch` and below; `engines` and `cli` import it.
"""

BACKENDS = ("collectives", "symmetric")
"What moves the rows: torch.distributed, or our kernels through memory that the GPUs of a host share."
