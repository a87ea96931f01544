"""How tokens spread over experts: counts, workloads, recordings, drift. Imports `kernel`; any later room may import it."""
