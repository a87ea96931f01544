"""rampwrap's own Triton kernels: token alignment and the fused MoE layer."""
