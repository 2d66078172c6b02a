"""Which score finds the weights that are not needed."""
