"""Stage-wise pruning: the proxy against the truth."""
