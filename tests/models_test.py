"""Counts, shapes, stages, bypasses and gradients of the networks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError
from jax import lax
from marks import slow
from traces import counted

from jaxprune import models, tree
from jaxprune.models import layers

KEY = jax.random.key(0)


def images(side, channels=3, batch=1):
  return jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)


def tokens(length, batch=1):
  return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def shapes(model, x):
  """Returns the variables of a network as shapes; nothing is computed."""
  return jax.eval_shape(model.init, KEY, x)


def equations(jaxpr):
  """Yields every equation of a jaxpr, those of inner ones too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for param in eqn.params.values():
      for inner in param if isinstance(param, tuple | list) else [param]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


def macs(fn, *args):
  """Returns the multiply-adds of convolutions and matrix products."""
  total = 0
  for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
    if eqn.primitive.name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      outputs = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
      terms = math.prod(kernel) // outputs
    elif eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    else:
      continue
    total += math.prod(eqn.outvars[0].aval.shape) * terms
  return total


def test_the_counter_of_multiply_adds_by_hand():
  x, k = jnp.zeros((2, 5, 5, 4)), jnp.zeros((3, 3, 2, 6))
  names = ('NHWC', 'HWIO', 'NHWC')
  conv = lambda x, k: lax.conv_general_dilated(
    x, k, (1, 1), 'VALID', dimension_numbers=names, feature_group_count=2
  )
  assert macs(conv, x, k) == 2 * 3 * 3 * 6 * 3 * 3 * 2
  assert macs(jnp.dot, jnp.zeros((3, 4)), jnp.zeros((4, 5))) == 60


# Published numbers of parameters and multiply-adds. Sources:
# - TV: the table of weights in torchvision's documentation (`num_params`), and
#   `_ops` in its sources, which has three decimals of 1e9 multiply-adds.
# - He: He et al. (2015), section 4.2, and the parameters of the checkpoints of
#   the usual CIFAR implementation; multiply-adds 40.55e6 (20), 125.49e6 (56)
#   and 252.89e6 (110) are those of the filter pruning papers.
# - K: Keras' `model.summary()`, trainable parameters; multiply-adds in millions
#   569, 325, 149, 41 are Howard et al. (2017), Table 6.
# - FC: Frankle & Carbin (2018), Figure 2: 266K weights, and 2.3M, of which 1.1M
#   are those of convolutions; with the biases, by hand.
# - KL: the usual ResNet-18 for CIFAR, without the first stride and the pooling;
#   0.56e9 multiply-adds.
# - LAP: kernels counted in the code of Lee et al. (2020); see below.
# - HF: `num_parameters()` of the checkpoints bert-base-uncased, bert-large-
#   uncased with a classifier of two classes.
# An exact integer of multiply-adds agrees with the rounded published one.
PUBLISHED = [
  ('resnet18', {}, 224, 11_689_512, 1_814_073_344),  # TV 1.814
  ('resnet34', {}, 224, 21_797_672, 3_663_761_408),  # TV 3.664
  ('resnet50', {}, 224, 25_557_032, 4_089_184_256),  # TV 4.089
  ('resnet101', {}, 224, 44_549_160, 7_801_405_440),  # TV 7.801
  ('vgg11', {'norm': False}, 224, 132_863_336, 7_609_090_048),  # TV 7.609
  ('vgg11', {}, 224, 132_868_840, 7_609_090_048),  # TV 7.609
  ('vgg16', {'norm': False}, 224, 138_357_544, 15_470_264_320),  # TV 15.47
  ('vgg16', {}, 224, 138_365_992, 15_470_264_320),  # TV 15.47
  ('vgg19', {'norm': False}, 224, 143_667_240, 19_632_062_464),  # TV 19.632
  ('vgg19', {}, 224, 143_678_248, 19_632_062_464),  # TV 19.632
  ('GoogLeNet', {}, 224, 6_624_904, 1_498_376_192),  # TV 1.498
  ('mobilenet_v2', {}, 224, 3_504_872, 300_774_272),  # TV 0.301
  ('mobilenet_v3_large', {}, 224, 5_483_032, 216_589_760),  # TV 0.217
  ('mobilenet_v3_small', {}, 224, 2_542_856, 56_510_400),  # TV 0.057
  ('mobilenet_v1', {}, 224, 4_231_976, 568_740_352),  # K 569
  ('mobilenet_v1', {'multiplier': 0.75}, 224, 2_585_560, 325_400_448),  # K 325
  ('mobilenet_v1', {'multiplier': 0.5}, 224, 1_331_592, 149_497_088),  # K 149
  ('mobilenet_v1', {'multiplier': 0.25}, 224, 470_072, 41_030_272),  # K 41
  ('resnet20', {}, 32, 269_722, 40_551_040),  # He
  ('resnet32', {}, 32, 464_154, 68_862_592),  # He
  ('resnet44', {}, 32, 658_586, 97_174_144),  # He
  ('resnet56', {}, 32, 853_018, 125_485_696),  # He
  ('resnet110', {}, 32, 1_727_962, 252_887_680),  # He
  # Option B has 2,752 more: 1 x 1 kernels of 16 x 32 and 32 x 64, two norms.
  ('resnet20', {'shortcut': 'projection'}, 32, 272_474, 40_813_184),
  ('resnet56', {'shortcut': 'projection'}, 32, 855_770, 125_747_840),
  ('resnet110', {'shortcut': 'projection'}, 32, 1_730_714, 253_149_824),
  (
    'resnet18',
    {'stem': 'small', 'num_classes': 10},
    32,
    11_173_962,
    555_422_720,
  ),
  # Zagoruyko & Komodakis (2016): 11.0e6.
  ('wrn_16_8', {}, 32, 10_961_370, 1_548_145_664),
  ('conv6', {}, 32, 2_262_602, 153_881_088),  # FC
  ('lenet_300_100', {}, 28, 266_610, 266_200),  # FC
  # By hand: 784 x 500 + 500, thrice 500 x 500 + 500, 500 x 10 + 10.
  ('mlp_500', {}, 28, 1_149_010, 1_147_000),
  # By hand: 150 + 6, 2,400 + 16, 48,000 + 120, 10,080 + 84, 840 + 10.
  ('LeNet5', {'pad': 2}, 28, 61_706, 416_520),
  ('bert_base', {}, 128, 109_483_778, 11_174_217_216),  # HF
  ('bert_large', {}, 128, 335_143_938, 39_461_062_656),  # HF
]
# Of these the quick tests count all; the others have the same families.
COUNTED = (
  *('resnet18', 'resnet20', 'vgg11', 'mobilenet_v1', 'mobilenet_v2'),
  *('mobilenet_v3_small', 'conv6', 'lenet_300_100', 'mlp_500', 'LeNet5'),
)


@pytest.mark.parametrize(
  ('name', 'options', 'side', 'params', 'ops'),
  [case if case[0] in COUNTED else slow(*case) for case in PUBLISHED],
)
def test_counts_are_the_published_ones(name, options, side, params, ops):
  if name.startswith('mobilenet'):
    options = {**options, 'grouped': True}
  model = getattr(models, name)(**options)
  x = images(side, 1 if side == 28 else 3)
  x = tokens(side) if name.startswith('bert') else x
  variables = shapes(model, x)
  assert tree.size(variables['params']) == params
  assert macs(model.apply, variables, x) == ops


# Prunable weights in the networks of Lee et al. (2020): convolutions and dense
# layers, without biases, norms and the convolutions of shortcuts.
LOOKAHEAD = [
  ('mlp_500', {}, images(28, 1), 1_147_000),
  ('lenet_300_100', {}, images(28, 1), 266_200),
  ('LeNet5', {}, images(32), 61_770),
  ('conv6', {}, images(32), 2_261_184),
  ('vgg11', {'hidden': (), 'num_classes': 10}, images(32), 9_222_848),
  ('vgg16', {'hidden': (), 'num_classes': 10}, images(32), 14_715_584),
  ('vgg19', {'hidden': (), 'num_classes': 10}, images(32), 20_024_000),
  (
    'vgg19',
    {'hidden': (), 'num_classes': 200, 'head': 'pool'},
    images(64),
    20_121_280,
  ),
  ('resnet18', {'stem': 'small', 'num_classes': 10}, images(32), 10_992_320),
  ('wrn_16_8', {'num_classes': 200}, images(64), 10_885_552),
]


@pytest.mark.parametrize(('name', 'options', 'x', 'count'), LOOKAHEAD)
def test_weights_are_those_of_lookahead(name, options, x, count):
  params = shapes(getattr(models, name)(**options), x)['params']
  kernels = {
    path: leaf
    for path, leaf in tree.leaves(params).items()
    if path.endswith('kernel') and 'shortcut' not in path
  }
  assert tree.size(kernels) == count


# Compiles in half the time; no test here is about speed.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)

# Every family with every layer four channels wide, or eight where it matters.
FAMILIES = {
  'resnet': (models.resnet_digits(blocks=(2, 2, 1)), images(8, 1, 4)),
  'bottleneck': (
    models.resnet50(blocks=(1, 2, 1, 1), num_classes=5),
    images(33, 3, 4),
  ),
  'option_a': (
    models.ResNet((4, 8), (1, 2), 5, shortcut='pad'),
    images(17, 3, 4),
  ),
  'wide': (models.WideResNet(16, 1), images(9, 3, 4)),
  'vgg': (
    models.vgg11(hidden=(8,), num_classes=5, dropout=0.0),
    images(32, 3, 4),
  ),
  'conv6': (models.conv6(), images(9, 3, 4)),
  'mlp': (models.mlp_500(), images(8, 1, 4)),
  'lenet5': (models.LeNet5(pad=2), images(15, 1, 4)),
  'mobilenet_v1': (
    models.mobilenet_v1(
      0.25, stem='small', num_classes=5, blocks=(1, 2, 1, 1, 1), grouped=True
    ),
    images(17, 3, 4),
  ),
  'mobilenet_v2': (
    models.mobilenet_v2(0.25, num_classes=5, dropout=0.0, grouped=True),
    images(33, 3, 4),
  ),
  'mobilenet_v3': (
    models.mobilenet_v3_small(0.25, num_classes=5, dropout=0.0, grouped=True),
    images(33, 3, 4),
  ),
  'googlenet': (
    models.GoogLeNet(5, stem='small', dropout=0.0),
    images(9, 3, 4),
  ),
  'bert': (
    models.BERT(11, 8, 3, 2, 16, positions=6, num_classes=3, dropout=0.0),
    tokens(5, 4),
  ),
}
# Blocks of one width: in option A a stream needs room to grow.
KEEP_WIDTHS = ('option_a',)


def values(variables, seed=0):
  """Returns random values for shapes; He et al.'s scale for the kernels."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    x = rng.standard_normal(leaf.shape).astype(np.float32)
    if path.endswith('kernel'):
      return x * np.sqrt(2 / math.prod(leaf.shape[:-1]), dtype=np.float32)
    x *= 0.1
    return x + 1 if path.endswith(('scale', 'var')) else x

  return tree.map_with_path(draw, variables)


@functools.cache
def family(name):
  """Returns a narrow network, its variables and a batch."""
  model, x = FAMILIES[name]
  if name not in KEEP_WIDTHS:
    wide = models.widths(shapes(model, x)['params'])
    narrow = {layer: min(8, n) for layer, n in wide.items()}
    model = model.clone(widths=narrow)
  rng = np.random.default_rng(1)
  if x.dtype == jnp.int32:
    batch = rng.integers(0, 11, x.shape)
  else:
    batch = rng.standard_normal(x.shape).astype(np.float32)
  return model, values(shapes(model, x)), jnp.asarray(batch)


# One of each kind; the others are among the slow tests.
QUICK = ('resnet', 'bottleneck', 'vgg', 'mlp', 'mobilenet_v2', 'bert')


def marked(names):
  """Marks as slow what is not quick."""
  return [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in names
  ]


every_family = pytest.mark.parametrize('name', marked(FAMILIES))


@every_family
def test_every_width_is_an_argument(name):
  model, variables, x = family(name)
  assert models.widths(variables['params']) | dict(model.widths) == (
    models.widths(variables['params'])
  )
  again = FAMILIES[name][0].clone(widths=models.widths(variables['params']))
  found = shapes(again, x)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, found)


@every_family
def test_the_stages_one_after_another_are_the_network(name):
  model, variables, x = family(name)

  @jit
  def both(variables, x):
    whole = model.apply(variables, x)
    for stage in range(model.num_stages):
      x = model.apply(variables, x, start=stage, stop=stage + 1)
    return whole, x

  whole, chained = both(variables, x)
  np.testing.assert_allclose(chained, whole, rtol=1e-5, atol=1e-5)
  assert np.ptp(whole, axis=0).max() > 1e-2 * np.abs(whole).max()


@every_family
def test_a_gradient_reaches_every_parameter(name):
  model, variables, x = family(name)
  rest = {k: v for k, v in variables.items() if k != 'params'}
  # A smooth function of the logits that no symmetry of the head cancels.
  loss = lambda p: jnp.sum(jnp.sin(model.apply({'params': p, **rest}, x)))
  found = tree.leaves(jit(jax.grad(loss))(variables['params']))
  dead = [path for path, g in found.items() if not np.any(g)]
  assert all(np.all(np.isfinite(g)) for g in found.values())
  # The softmax does not see a bias that all keys share.
  assert [path for path in dead if not path.endswith('key/bias')] == []


@every_family
def test_computing_in_bfloat16_keeps_parameters_and_logits(name):
  model, variables, x = family(name)
  half = model.clone(dtype=jnp.bfloat16)
  assert shapes(half, x) == jax.eval_shape(lambda: variables)
  jaxpr = jax.make_jaxpr(half.apply)(variables, x)
  heavy = [
    eqn.outvars[0].aval.dtype
    for eqn in equations(jaxpr.jaxpr)
    if eqn.primitive.name in ('conv_general_dilated', 'dot_general')
  ]
  assert set(heavy) == {jnp.dtype(jnp.bfloat16)}
  assert jaxpr.out_avals[0].dtype == jnp.float32


REMAT = [name for name, (m, _) in FAMILIES.items() if hasattr(m, 'remat')]


@pytest.mark.parametrize('name', marked(REMAT))
def test_remat_changes_the_program_and_not_the_variables(name):
  model, variables, x = family(name)
  again = model.clone(remat=True)
  assert shapes(again, x) == jax.eval_shape(lambda: variables)
  run = lambda m: jax.make_jaxpr(lambda v: m.apply(v, x))(variables).jaxpr
  count = lambda m: sum('remat' in e.primitive.name for e in equations(run(m)))
  assert count(model) == 0
  assert count(again) > 2


def test_remat_gives_the_same_gradient():
  model, variables, x = family('resnet')

  def gradient(model, params):
    run = lambda p: model.apply(
      {**variables, 'params': p}, x, True, mutable=['batch_stats']
    )[0]
    return jax.grad(lambda p: jnp.sum(jnp.sin(run(p))))(params)

  pair = jit(
    lambda p: (gradient(model, p), gradient(model.clone(remat=True), p))
  )
  for a, b in zip(
    *map(jax.tree.leaves, pair(variables['params'])), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


RESIZABLE = [name for name in FAMILIES if name not in ('mlp', 'lenet5', 'bert')]


@pytest.mark.parametrize('name', marked(RESIZABLE))
def test_paddings_do_not_depend_on_the_side_of_the_image(name):
  model, _ = FAMILIES[name]
  if getattr(model, 'head', 'pool') == 'flatten':
    model = model.clone(head='pool')

  def paddings(side):
    x = images(side, 1)
    variables = shapes(model, x)
    jaxpr = jax.make_jaxpr(model.apply)(variables, x).jaxpr
    heavy = ('conv_general_dilated', 'reduce_window_max')
    return [
      eqn.params['padding']
      for eqn in equations(jaxpr)
      if eqn.primitive.name in heavy
    ]

  assert len(paddings(64)) > 2
  assert paddings(64) == paddings(65)


up = lambda n: -(-n // 2)
down = lambda n: n // 2


@pytest.mark.parametrize('side', [slow(32), 33, slow(35)])
@pytest.mark.parametrize(
  ('name', 'half', 'first', 'strides'),
  [
    # The stages' own strides, after what the stem leaves.
    ('resnet', up, 0, (1, 2, 2)),
    ('bottleneck', up, 2, (1, 2, 2, 2)),
    ('wide', up, 0, (1, 2, 2)),
    ('vgg', down, 0, (2, 2, 2, 2, 2)),
    ('conv6', down, 0, (2, 2, 2)),
    ('mobilenet_v1', down, 0, (1, 2, 2, 2, 2)),  # TensorFlow's: (0, 1).
    ('mobilenet_v2', up, 1, (1, 2, 2, 2, 1, 2, 1)),
    ('mobilenet_v3', up, 1, (2, 2, 2, 2)),
  ],
)
def test_the_sides_of_odd_maps(name, half, first, strides, side):
  model, x = FAMILIES[name]
  if hasattr(model, 'head'):
    model = model.clone(head='pool')
  x = images(side, x.shape[-1])
  variables = shapes(model, x)
  for _ in range(first):
    side = half(side)
  for stop, stride in enumerate(strides[:-1], 1):
    side = half(side) if stride == 2 else side
    run = lambda v, x, stop=stop: model.apply(v, x, stop=stop)
    assert jax.eval_shape(run, variables, x).shape[1:3] == (side, side)
  assert jax.eval_shape(model.apply, variables, x).ndim == 2


def test_googlenet_pools_like_ceil_mode_on_any_side():
  x = images(70)
  model = models.GoogLeNet()
  run = lambda v, x: model.apply(v, x, stop=1)
  # 70 -> 35, then three poolings of which two have a window that hangs over.
  assert jax.eval_shape(run, shapes(model, x), x).shape == (1, 4, 4, 480)


# Norms.


def test_training_moves_the_statistics_by_a_tenth_and_eval_reads_them():
  model, variables, x = family('resnet')
  run = jit(
    functools.partial(model.apply, mutable=['batch_stats']), static_argnums=2
  )
  _, state = run(variables, x, True)
  kernel = variables['params']['stem']['kernel']
  names = ('NHWC', 'HWIO', 'NHWC')
  y = lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=names
  )
  found = state['batch_stats']['stem_norm']
  before = variables['batch_stats']['stem_norm']
  mean = 0.9 * before['mean'] + 0.1 * y.mean((0, 1, 2))
  var = 0.9 * before['var'] + 0.1 * y.var((0, 1, 2))
  np.testing.assert_allclose(found['mean'], mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(found['var'], var, rtol=1e-3)
  _, state = run(variables, x, False)
  jax.tree.map(
    np.testing.assert_array_equal,
    state['batch_stats'],
    variables['batch_stats'],
  )


@pytest.mark.parametrize('name', ['mobilenet_v1', 'mobilenet_v2'])
def test_the_given_epsilon_is_that_of_every_norm(name):
  model, variables, x = family(name)
  greater = tree.map_with_path(
    lambda path, v: v + (0.5 - model.epsilon) if path.endswith('var') else v,
    variables,
  )
  found = model.clone(epsilon=0.5).apply(variables, x)
  np.testing.assert_allclose(found, model.apply(greater, x), 1e-4, 1e-5)


@pytest.mark.parametrize(
  'build',
  [models.mobilenet_v2, models.mobilenet_v3_large, models.mobilenet_v3_small],
)
def test_every_default_of_a_mobilenet_gives_way(build):
  given = {'last': 8, 'hidden': 6, 'momentum': 0.5, 'epsilon': 0.1}
  given |= {'table': models.mobilenet_v2(0.25).table, 'stem_channels': 8}
  found = build(**given, activation=nn.relu)
  assert found == models.MobileNet(**given, activation=nn.relu)


def test_an_image_is_normalised_by_its_batch_in_training_only():
  model, variables, x = family('resnet')
  train = lambda x: model.apply(variables, x, True, mutable=['batch_stats'])[0]
  eval_ = lambda x: model.apply(variables, x)
  run = jit(lambda x: (train(x)[:2], train(x[:2]), eval_(x)[:2], eval_(x[:2])))
  trained, trained_alone, evaluated, evaluated_alone = run(x)
  np.testing.assert_allclose(evaluated, evaluated_alone, rtol=1e-4, atol=1e-5)
  assert np.abs(trained - trained_alone).max() > 1e-2


# Bypassed blocks.

BYPASSED = {
  'resnet': 'stage1_block2',
  'bottleneck': 'stage2_block2',
  'option_a': 'stage2_block2',
  'wide': 'stage1_block2',
  'mobilenet_v1': 'stage2_block2',
  'mobilenet_v2': 'stage2_block2',
  'mobilenet_v3': 'stage2_block2',
  'bert': 'layer2',
}


@pytest.mark.parametrize(
  'name', [n if n in ('resnet', 'mobilenet_v2') else slow(n) for n in BYPASSED]
)
def test_a_skipped_block_is_left_out(name):
  model, variables, x = family(name)
  block = BYPASSED[name]
  assert block in model.bypassable
  params = {k: v for k, v in variables['params'].items() if k != block}
  drop = {k: v for k, v in model.widths.items() if not k.startswith(block)}
  short = model.clone(drop=(block,), widths=drop)
  assert shapes(short, x)['params'].keys() == params.keys()

  def run(keep):
    whole = model.apply(variables, x)
    static = model.apply(variables, x, keep={block: False})
    traced = model.apply(variables, x, keep={block: keep})
    return (
      whole,
      static,
      traced,
      short.apply({**variables, 'params': params}, x),
    )

  run, traces = counted(run)
  whole, static, traced, short_ = run(jnp.array(False))
  np.testing.assert_allclose(traced, static, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(short_, static, rtol=1e-5, atol=1e-5)
  assert np.abs(whole - static).max() > 1e-3
  whole, _, traced, _ = run(jnp.array(True))
  np.testing.assert_allclose(traced, whole, rtol=1e-5, atol=1e-5)
  assert len(traces) == 1


def test_a_skipped_block_keeps_its_statistics_in_training():
  model, variables, x = family('resnet')

  @jit
  def run(keep):
    given = {'stage1_block2': keep}
    return model.apply(variables, x, True, keep=given, mutable=['batch_stats'])

  _, off = run(jnp.array(False))
  _, on = run(jnp.array(True))
  before = variables['batch_stats']['stage1_block2']
  after = off['batch_stats']['stage1_block2']
  jax.tree.map(np.testing.assert_array_equal, after, before)
  after = on['batch_stats']['stage1_block2']
  assert np.any(after['norm1']['mean'] != before['norm1']['mean'])


# Blocks by their formulas; whole networks against NumPy are in weights_test.


def by_formula(block, x):
  """Returns the block's output, and its convolutions, norms and their chain."""
  variables = values(jax.eval_shape(lambda x: block.init(KEY, x, False), x))
  params, stats = variables['params'], variables['batch_stats']

  def conv(name, x, stride=1):
    kernel = params[name]['kernel']
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    names = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
      x, kernel, (stride, stride), pad, dimension_numbers=names
    )

  def norm(name, x, epsilon=1e-5):
    at = lambda tree, leaf: tree[name][leaf][None, None, None]
    x = (x - at(stats, 'mean')) / np.sqrt(at(stats, 'var') + epsilon)
    return x * at(params, 'scale') + at(params, 'bias')

  return block.apply(variables, x, False), conv, norm


def test_a_bottleneck_strides_in_its_3_x_3_convolution():
  x = jax.random.normal(KEY, (2, 5, 5, 3))
  block = models.resnet.Block((2, 4, 6), 2, 'projection')
  found, conv, norm = by_formula(block, x)
  y = nn.relu(norm('norm1', conv('conv1', x)))
  y = nn.relu(norm('norm2', conv('conv2', y, 2)))
  y = norm('norm3', conv('conv3', y))
  y = nn.relu(y + norm('shortcut_norm', conv('shortcut', x, 2)))
  np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('projects', [True, False])
def test_a_pre_activation_block_normalises_first(projects):
  x = jax.random.normal(KEY, (2, 5, 5, 4))
  stride = 2 if projects else 1
  block = models.resnet.PreActivationBlock((3, 4), stride, projects)
  found, conv, norm = by_formula(block, x)
  a = nn.relu(norm('norm1', x))
  y = conv('conv2', nn.relu(norm('norm2', conv('conv1', a, stride))))
  y = y + (conv('shortcut', a, stride) if projects else x)
  np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


def test_the_branches_of_inception_are_side_by_side():
  x = jax.random.normal(KEY, (2, 4, 4, 3))
  block = models.inception.Inception((2, 3, 4, 2, 5, 3), kernel=5)
  found, conv, norm = by_formula(block, x)
  unit = lambda name, x: nn.relu(norm(f'{name}_norm', conv(name, x), 1e-3))
  padded = jnp.pad(
    x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf
  )
  pooled = functools.reduce(
    jnp.maximum,
    [padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)],
  )
  branches = [
    unit('branch1', x),
    unit('branch2', unit('branch2_reduce', x)),
    unit('branch3', unit('branch3_reduce', x)),
    unit('branch4', pooled),
  ]
  expected = jnp.concatenate(branches, axis=-1)
  assert expected.shape == (2, 4, 4, 14)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Option A.


def test_a_shortcut_without_parameters_strides_and_pads():
  block = models.resnet.Block((1, 5), 2, 'pad')
  x = jnp.arange(9.0).reshape(1, 3, 3, 1)
  variables = block.init(KEY, x, False)
  silent = jax.tree.map(jnp.zeros_like, variables)
  by_default = block.apply(silent, x, False)
  np.testing.assert_array_equal(by_default[0, :, :, 2], [[0, 2], [6, 8]])
  assert by_default.sum() == 16
  shifted = block.clone(pad=0).apply(silent, x, False)
  np.testing.assert_array_equal(shifted[0, :, :, 0], [[0, 2], [6, 8]])


def test_the_padding_of_a_shrunk_stream_is_an_argument():
  given = {'stem': 3, 'stage2_block1/conv2': 7}
  model = models.resnet20(widths=given, pads={'stage2_block1': 4})
  found = models.widths(shapes(model, images(8))['params'])
  assert found['stage1_block3/conv2'] == 3
  assert found['stage2_block3/conv2'] == 7


# Depthwise convolution.


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kernel', [3, 5])
@pytest.mark.parametrize('pads', [layers.same, layers.tensorflow_pad])
def test_shift_and_add_is_the_grouped_convolution(kernel, stride, pads):
  pad = pads(kernel) if pads is layers.same else pads(kernel, stride)
  x = jax.random.normal(KEY, (2, 7, 10, 3))
  module = layers.DepthwiseConv(kernel, stride, pad, True)
  variables = module.init(KEY, x)
  grouped = module.apply(variables, x)
  shifted = module.clone(grouped=False).apply(variables, x)
  assert grouped.shape == shifted.shape
  np.testing.assert_allclose(shifted, grouped, rtol=1e-5, atol=1e-6)


def test_the_backend_chooses_the_form_of_a_depthwise_convolution(monkeypatch):
  module = layers.DepthwiseConv(3, 1, layers.same(3))
  x = images(5)
  variables = shapes(module, x)

  def uses_convolution():
    jaxpr = jax.make_jaxpr(lambda v, x: module.apply(v, x))(variables, x).jaxpr
    names = {eqn.primitive.name for eqn in equations(jaxpr)}
    return 'conv_general_dilated' in names

  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  assert not uses_convolution()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert uses_convolution()


def test_a_depthwise_kernel_starts_by_its_fan_in():
  kernel = layers.DepthwiseConv(3, 1, layers.same(3)).init(
    KEY, jnp.zeros((1, 3, 3, 4096))
  )['params']['kernel']
  np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 9), rtol=0.03)


def test_shift_and_add_sums_in_float32():
  # Nine times 1/256 on 1: a sum in bfloat16 would stay at 1.
  x = jnp.ones((1, 3, 3, 1), jnp.bfloat16)
  kernel = jnp.full((3, 3, 1, 1), 1 / 256, jnp.bfloat16).at[0, 0].set(1)
  y = layers.shift_and_add(x, kernel, 1, ((0, 0), (0, 0)))
  assert y.dtype == jnp.bfloat16
  assert float(y[0, 0, 0, 0]) == 1.03125


# BERT.


def test_padding_is_not_read():
  model, variables, x = family('bert')
  mask = jnp.arange(5)[None] < jnp.array([5, 4, 3, 2])[:, None]
  noise = jnp.where(mask, x, 10 - x)
  run = jit(lambda x, mask: model.apply(variables, x, mask=mask))
  np.testing.assert_allclose(run(x, mask), run(noise, mask), rtol=1e-5)
  assert np.abs(run(x, mask) - run(x, jnp.ones_like(mask))).max() > 1e-4


@pytest.mark.parametrize(
  ('wrong', 'options', 'message'),
  [
    (11, {}, r'Tokens must be in 0\.\.10 \(`vocab_size`\), got 0\.\.11'),
    (-1, {}, r'Tokens must be in 0\.\.10 \(`vocab_size`\), got -1\.\.0'),
    (1, {'types': [[0, 2]]}, r'Token types must be in 0\.\.1 \(`types`\), g'),
    (
      1,
      {'types': [[0]]},
      r'`types` must have the shape .*\(1, 2\), got \(1, 1\)',
    ),
    (1, {'mask': [1, 1]}, r'`mask` must have the shape .*\(1, 2\), got \(2,\)'),
  ],
)
def test_tokens_types_and_masks_that_are_none_are_named(
  wrong, options, message
):
  model, variables, _ = family('bert')
  tokens = jnp.array([[min(wrong, 0), max(wrong, 0)]])
  options = {name: jnp.array(x) for name, x in options.items()}
  with pytest.raises(ValueError, match=message):
    model.apply(variables, tokens, **options)


def test_heads_are_removed_by_width():
  inner = {f'layer2/{part}': 4 for part in ('query', 'key', 'value')}
  model = FAMILIES['bert'][0].clone(widths=inner)
  params = shapes(model, tokens(5))['params']['layer2']
  assert params['attention_output']['kernel'].shape == (4, 8)


def test_dropout_needs_its_rng_and_uses_it():
  model, variables, x = family('bert')
  model = model.clone(dropout=0.5)
  run = jit(lambda key: model.apply(variables, x, True, rngs={'dropout': key}))
  a, b = run(jax.random.key(1)), run(jax.random.key(2))
  assert np.abs(a - b).max() > 1e-2
  with pytest.raises(InvalidRngError, match='dropout'):
    jax.eval_shape(lambda: model.apply(variables, x, True))


# Bad input.

NO_IMAGE = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
BYTES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
digits, v2, bert = models.resnet_digits, models.mobilenet_v2, models.BERT
QKV = {f'layer1/{part}': 100 for part in ('query', 'key', 'value')}


@pytest.mark.parametrize(
  ('model', 'x', 'error', 'message'),
  [
    (
      digits(),
      NO_IMAGE,
      ValueError,
      r'\(batch, height, width, channels\), got',
    ),
    (models.vgg11(), NO_IMAGE, ValueError, 'Images must have shape'),
    (models.mobilenet_v1(), NO_IMAGE, ValueError, 'Images must have shape'),
    (models.LeNet5(), NO_IMAGE, ValueError, 'Images must have shape'),
    (models.WideResNet(), BYTES, TypeError, 'got uint8; scale them first'),
    (models.conv6(), images(7), ValueError, 'at least 8 x 8, got 7 x 7'),
    (models.GoogLeNet(), BYTES, TypeError, 'got uint8; scale them first'),
    (v2(), BYTES, TypeError, 'Images must be floating point'),
    (models.mlp_500(), BYTES, TypeError, 'got uint8; scale them first'),
    (models.vgg11(), images(31), ValueError, 'at least 32 x 32, got 31 x 31'),
    (models.LeNet5(), images(13), ValueError, 'before conv2, got 4 x 4'),
    (
      digits(widths={'stage9/conv': 3}),
      images(8),
      ValueError,
      "names 'stage9/conv', and ResNet has no such layer; it has: stem, stage1",
    ),
    (
      digits(widths={'stage1_block1/conv2': 3}),
      images(8),
      ValueError,
      "'stage1_block1/conv2' must be 16, got 3: the width of a layer that is",
    ),
    (
      v2(widths={'stage2_block1/depthwise': 3}),
      images(8),
      ValueError,
      "'stage2_block1/depthwise' must be 96, got 3",
    ),
    (
      digits(drop=('stage2_block1',)),
      images(8),
      ValueError,
      "`drop` names 'stage2_block1'; the blocks that can be skipped are: st",
    ),
    (
      models.resnet20(pads={'stem': 1}),
      images(8),
      ValueError,
      "`pads` names 'stem'; the blocks that pad are: stage2_block1, stage3",
    ),
    (
      models.resnet20(widths={'stage2_block1/conv2': 15}),
      images(8),
      ValueError,
      'takes 16 channels to 15 with -1 zero channels',
    ),
    (models.WideResNet(15), images(8), ValueError, r'6 n \+ 4, n >= 1, got 15'),
    (bert(hidden=10, heads=4), tokens(3), ValueError, 'got 10 and 4; or give'),
    (bert(positions=4), tokens(5), ValueError, 'at most 4 tokens'),
    (bert(), images(8), TypeError, r'integers of shape \(batch, length\), got'),
    (bert(widths=QKV), tokens(5), ValueError, 'one multiple of 64'),
  ],
)
def test_what_cannot_be_is_named(model, x, error, message):
  with pytest.raises(error, match=message):
    shapes(model, x)


@pytest.mark.parametrize(
  ('build', 'argument', 'given', 'known'),
  [
    (models.resnet20, 'stem', 'Small', "'small', 'large'"),
    (models.resnet20, 'shortcut', 'B', "'projection', 'pad'"),
    (models.resnet20, 'head', 'Pool', "'pool', 'flatten'"),
    (models.vgg11, 'head', 'Pool', "'flatten', 'pool'"),
    (models.GoogLeNet, 'stem', 'Large', "'small', 'large'"),
    (models.mobilenet_v1, 'stem', 'Large', "'small', 'large'"),
    (models.mobilenet_v2, 'stem', 'Large', "'small', 'large'"),
  ],
)
def test_a_misspelt_choice_builds_no_network(build, argument, given, known):
  message = f'`{argument}` must be one of {known}, got {given!r}'
  with pytest.raises(ValueError, match=message):
    shapes(build(**{argument: given}), images(32))


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (
      models.resnet20(channels=(4, 8, 8, 8)),
      'channels 4, blocks 3, strides 3 entries',
    ),
    (digits(strides=(1, 2)), 'channels 3, blocks 3, strides 2 entries'),
    (models.vgg11(convs=(1, 1)), 'convs 2, channels 5 entries'),
    (
      models.mobilenet_v1(blocks=(1, 2)),
      'channels 5, blocks 2, strides 5 entries',
    ),
  ],
)
def test_every_stage_has_an_entry_in_every_list(model, message):
  with pytest.raises(ValueError, match=message):
    shapes(model, images(32))


@pytest.mark.parametrize('stages', [(1, 1), (-1, 2), (0, 9)])
def test_stages_that_are_none_are_named(stages):
  start, stop = stages
  model, variables, x = family('resnet')
  with pytest.raises(ValueError, match=f'<= 3, got start={start}, stop={stop}'):
    model.apply(variables, x, start=start, stop=stop)


def test_a_block_that_cannot_be_skipped_is_named():
  model, variables, x = family('resnet')
  with pytest.raises(ValueError, match="`keep` names 'stage2_block1'; the"):
    model.apply(variables, x, keep={'stage2_block1': False})
