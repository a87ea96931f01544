"""What a model's checkpoint says of its MoE layers: sizes, layers, quantisation. Imports `kernel`; `engines` and `cli` import it."""
