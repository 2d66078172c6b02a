"""Leaves by path: their names, and which of them are weights."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxprune import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
  value: jax.Array
  key: jax.Array


class Head(eqx.Module):
  value: jax.Array


def test_a_field_named_value_keeps_its_name():
  """Whether it has siblings or not, beside variables of Flax."""
  x = jnp.ones((2, 3))
  params = {
    'att': Attention(x, x),
    'boxed': nn.Partitioned(x, ('a', 'b')),
    'head': Head(x),
    'nnx': nnx.Param(x),
  }
  paths = ['att/value', 'att/key', 'boxed', 'head/value', 'nnx']
  assert list(tree.leaves(params)) == paths
  named = tree.map_with_path(lambda path, a, b: f'{path} {b}', params, params)
  assert [text.split()[0] for text in jax.tree.leaves(named)] == paths


def test_an_entry_named_value_keeps_its_name():
  state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[1]
  params = {'head': {'value': jnp.ones((2, 3))}, 'linear': state}
  assert list(tree.leaves(params)) == [
    'head/value',
    'linear/bias',
    'linear/kernel',
  ]
