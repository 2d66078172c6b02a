"""What the core packages alone must do: from ``trace`` to a checkpoint.

  python tests/core.py

A script, so that it also runs where neither pytest nor an extra is installed.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune as jp
from jaxprune import data, io, models, report
from jaxprune.io import checkpoint

# Rooms whose functions may need an extra; to import them needs none.
ROOMS = (data, io, report)


def two_layers():
  """Returns a network of Flax NNX as a function of its state, and the state."""
  rngs = nnx.Rngs(0)
  layers = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
  graph, state = nnx.split(nnx.Sequential(layers[0], nnx.relu, layers[1]))
  return lambda state, x: nnx.merge(graph, state)(x), state


def cut(fn, params, x):
  """Returns a network at half of its multiply-adds, proven."""
  graph = jp.trace(fn, params, x)
  scores = graph.reduce(jp.scores.magnitude(params))
  plan = jp.plan(graph, scores, jp.budget(macs=0.5))
  small = jp.shrink(graph, plan, params)
  assert jp.specialise(graph, plan)(small, x).shape == (8, 10)
  proof = jp.check(graph, plan, params, x)
  assert max(proof.values, proof.gradients) < 1e-5
  assert jp.cost.macs(graph, plan) <= 0.5 * jp.cost.macs(graph)
  return small


def sparse(loss, params):
  """Returns params at 90 % zeros, by a link of optax."""
  tx = optax.chain(
    optax.sgd(1e-2),
    jp.sparsify(jp.scores.magnitude, jp.schedules.constant(0.9)),
  )
  updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
  params = optax.apply_updates(params, updates)
  jp.check_sparse(params, state)
  share = jp.masks.sparsity(optax.tree.get(state, 'masks'))
  np.testing.assert_allclose(share, 0.9, atol=1e-2)
  return params


def soften(loss, params):
  """Checks that PDP is finite in the loss, and ends in 90 % zeros."""
  pdp = jp.soft.pdp_init(params, {'.*kernel': 0.9}, tau=0.0, c=0.25)
  pdp = pdp._replace(ramp=jnp.float32(1.0))
  assert jnp.isfinite(jax.jit(lambda p: loss(jp.soft.pdp(p, pdp)))(params))
  hard = jp.soft.harden(params, pdp)
  np.testing.assert_allclose(jp.masks.sparsity(hard.masks), 0.9, atol=1e-2)


def keep(folder, small):
  """Checks that a checkpoint and a file of arrays give the same params back."""
  with checkpoint.Checkpointer(folder / 'steps') as keeper:
    keeper.save(3, small)
    restored = keeper.restore(small).state
  checkpoint.save_arrays(folder / 'small.npz', small)
  loaded = checkpoint.load_arrays(folder / 'small.npz', small)
  for other in (restored, loaded):
    jax.tree.map(np.testing.assert_array_equal, small, other)


def main():
  """Goes the whole way once."""
  mlp = models.MLP(hidden=(12, 12), num_classes=10)
  x = jax.random.normal(jax.random.key(0), (8, 6))
  params = mlp.init(jax.random.key(1), x)

  def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(
      mlp.apply(params, x), jnp.arange(8)
    ).mean()

  cut(*two_layers(), x)
  small = cut(mlp.apply, params, x)
  sparse(loss, params)
  soften(loss, params)
  with tempfile.TemporaryDirectory() as folder:
    keep(pathlib.Path(folder), small)
  print('The core works.')


if __name__ == '__main__':
  main()
