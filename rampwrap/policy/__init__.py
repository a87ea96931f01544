"""From a histogram to a config: static tables, policies, the few candidates of each batch size. Imports `model` and below; `compare`, `plan`, `dispatch` and above import it."""
