"""What the jobs that search share: a training that can stop at any moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import search, train
from jaxprune.io import checkpoint


def test_a_training_that_stops_goes_on_to_the_same_bits(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 255, (22, 2, 2, 1)), jnp.uint8)
  examples = train.Examples(images, jnp.arange(22) % 3)

  def apply(variables, x, **options):
    return x.reshape(len(x), -1) @ variables['params'], {}

  tx = optax.adam(0.1)
  change = lambda key, x: x + jax.random.normal(key, x.shape)
  step = train.make_step(apply, tx, lambda x: x / 255, change=change)
  params = jnp.ones((4, 3))
  first = train.State(params, {}, tx.init(params))
  save, saved = checkpoint.Checkpointer.save, []

  def fit(folder, stop=None):
    def counted(self, number, state):
      if number == stop:
        raise KeyboardInterrupt
      saved.append(number)
      return save(self, number, state)

    monkeypatch.setattr(checkpoint.Checkpointer, 'save', counted)
    return search.fit(
      step, first, examples, tmp_path / folder,
      seed=1, epochs=2, batch=4, save_every=2,
    )  # fmt: skip

  whole = fit('whole')
  assert saved == [2, 4, 5, 7, 9, 10]  # An epoch has 5 steps.
  with pytest.raises(KeyboardInterrupt):
    fit('cut', stop=9)
  saved.clear()
  again = fit('cut')
  assert saved == [9, 10]
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.abs(whole.params - 1).max() > 0.1
