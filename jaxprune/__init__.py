"""jaxprune: pruning for JAX, from masks to a smaller network."""

from jaxprune import tree as tree

__version__ = '0.1.0'
