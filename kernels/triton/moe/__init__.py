"""The fused MoE layer: configs, GEMMs, host side."""
