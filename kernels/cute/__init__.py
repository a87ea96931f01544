"""rampwrap's CuTe DSL fused MoE for sm_90a: two launches (up, down) or one, compiled ahead of time.

Importing this needs neither the CuTe DSL nor a GPU.
"""
