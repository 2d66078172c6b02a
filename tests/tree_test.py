"""Leaves by path: their names, and which of them are weights."""

import jax.numpy as jnp
from flax import nnx

from jaxprune import tree


def test_an_entry_named_value_keeps_its_name():
  state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[1]
  params = {'head': {'value': jnp.ones((2, 3))}, 'linear': state}
  assert list(tree.leaves(params)) == [
    'head/value',
    'linear/bias',
    'linear/kernel',
  ]
