"""From timings to a prediction: the cost models, their fit, and the arrays that C and the GPU read. Imports `measure` and below; any later room may import it."""
