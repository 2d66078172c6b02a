"""Every shipped network, cut at random, computes what its masked self does."""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import cost, models, plans, structure, tree
from jaxprune.plans.proof import check

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
WORDS = jax.ShapeDtypeStruct((2, 12), jnp.int32)
BERT = models.BERT(
  vocab_size=50, hidden=24, depth=2, heads=3, intermediate=32, positions=16
)
ZOO = {
  'lenet-5': (models.LeNet5(), IMAGE),
  'resnet20': (models.resnet20(), IMAGES),
  'wrn-10-1': (models.WideResNet(depth=10, factor=1), IMAGE),
  'googlenet': (models.GoogLeNet(stem='small', num_classes=10), IMAGE),
  'mobilenet-v1': (models.mobilenet_v1(0.25), IMAGE),
  'mobilenet-v1-grouped': (models.mobilenet_v1(0.25, grouped=True), IMAGES),
  'mobilenet-v2': (models.mobilenet_v2(0.35), IMAGE),
  'mobilenet-v3-small': (models.mobilenet_v3_small(0.5), IMAGE),
  'bert': (BERT, WORDS),
}


# Through 27 norms of random weights float32 rounds to 8e-6 (eval) and 4e-5
# (train); the same check in float64 measures 2e-13.
TOLERANCE = {'mobilenet-v1': 1e-4, 'mobilenet-v1-grouped': 1e-4}


def lively(variables, key):
  """Every leaf random and of a scale at which the signal survives."""

  def one(path, x):
    name = path[-1].key
    draw = jax.random.normal(
      jax.random.fold_in(
        key, zlib.crc32(jax.tree_util.keystr(path).encode()) % 2**31
      ),
      x.shape,
    )
    if name in ('var', 'scale'):
      return 1 + 0.3 * jnp.abs(draw)
    if x.ndim < 2:
      return 0.1 * draw
    return draw * np.sqrt(2 / np.prod(x.shape[:-1]))

  return jax.tree_util.tree_map_with_path(one, variables)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'train'),
  [
    *((name, False) for name in ZOO),
    ('lenet-5', True),
    ('resnet20', True),
    ('mobilenet-v1-grouped', True),
    ('bert', True),
  ],
)
def test_half_of_every_group_at_random(name, train):
  model, spec = ZOO[name]
  key = jax.random.key(0)
  if spec.dtype == jnp.int32:
    x = jax.random.randint(key, spec.shape, 0, 50)
  else:
    x = jax.random.normal(key, spec.shape)
  init = lambda key: model.init(key, jnp.zeros(spec.shape, spec.dtype), False)
  variables = lively(jax.eval_shape(init, key), key)

  def fn(v, x):
    if not train:
      return model.apply(v, x, False)
    rngs = {'dropout': jax.random.key(1)}
    return model.apply(v, x, True, mutable=['batch_stats'], rngs=rngs)

  graph = structure.trace(fn, variables, x, reductions='keep')
  assert graph.groups
  rng = np.random.default_rng(0)
  plan = plans.from_kept(
    graph,
    {
      name: rng.permutation(group.size)[: (group.size + 1) // 2]
      for name, group in graph.groups.items()
    },
  )
  with jax.numpy_rank_promotion('allow'):
    check(graph, plan, variables, x, tolerance=TOLERANCE.get(name, 1e-5))
  removed = 1 - cost.macs(graph, plan) / cost.macs(graph)
  assert removed > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'pattern'),
  [
    ('lenet-5', '.*'),
    ('resnet20', '.*conv1'),  # The zero channels of its shortcuts stay.
    ('googlenet', '.*'),
    ('mobilenet-v1', '.*'),
    ('mobilenet-v2', '.*'),
    ('mobilenet-v3-small', '.*'),
  ],
)
def test_the_same_module_at_the_small_widths_is_the_small_network(
  name, pattern
):
  model, spec = ZOO[name]
  key = jax.random.key(0)
  x = jax.random.normal(key, (2, *spec.shape[1:]))
  variables = lively(jax.eval_shape(model.init, key, x), key)
  graph = structure.trace(model.apply, variables, x)
  dropped = list(graph.blocks)[::2]
  widths = {
    name: (group.size + 1) // 2
    for name, group in graph.groups.items()
    if re.fullmatch(pattern, name)
  }
  plan = plans.from_widths(graph, widths, dropped=dropped)
  small = tree.compact(plans.shrink(graph, plan, variables))
  module = model.clone(widths=models.widths(small['params']))
  if dropped:
    module = module.clone(drop=tuple(dropped))
  want = jax.jit(module.apply)(small, x)
  found = jax.jit(plans.specialise(graph, plan))(small, x)
  scale = float(jnp.max(jnp.abs(want)))
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * scale)
  assert dropped or not graph.blocks
