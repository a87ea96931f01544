"""The compiled CuTe kernels of rampwrap, which finds the library in this folder."""
