"""What our Triton and CuTe kernels share. Imports `rampwrap.kernel`; both families import it."""
