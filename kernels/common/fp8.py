"""The numbers of FP8 (e4m3) by blocks of 128; plain numbers, so that those who only plan import no torch."""

GROUP = 128
"Side of the blocks of weights, and width of the groups of activations, that share a scale."
FP8_MAX = 448.0
MIN_ABS = 1e-10
"Keeps the scale of an all-zero group finite; far below any real activation."
