"""The canvas: every size in one compile, exactly, or a refusal by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from traces import counted

from jaxprune import models
from jaxprune.structure.sizes.padded import bilinear, border, on_canvas, resize

KEY = jax.random.key(0)
SIDES = (4, 5, 7, 8)


def image(side, seed=1):
  return jax.random.normal(jax.random.key(seed), (2, side, side, 3))


def corner(x, side):
  """The image in the corner of the largest canvas, with rubbish around it."""
  full = jnp.full((x.shape[0], SIDES[-1], SIDES[-1], x.shape[3]), 1e3)
  return full.at[:, :side, :side].set(x)


def agree(fn, sides=SIDES, rtol=1e-5):
  """fn on the canvas gives what fn gives at every side, in one compile."""
  call = on_canvas(fn, [(image(side),) for side in sides])
  run, traces = counted(call)
  for k, side in enumerate(sides):
    x = image(side, seed=k)
    wanted = fn(x)
    found = run(k, corner(x, side))
    for a, b in zip(
      jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
    ):
      part = a[tuple(slice(n) for n in b.shape)]
      np.testing.assert_allclose(part, b, rtol=rtol, atol=1e-5)
  assert len(traces) == 1


def convolve(x, stride=1, padding=((1, 1), (1, 1)), features=4, size=3):
  shape = (size, size, x.shape[3], features)
  kernel = jax.random.normal(jax.random.key(7), shape)
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=numbers
  )


def normalised(x):
  mean = jnp.mean(x, (0, 1, 2), keepdims=True)
  var = jnp.mean(jnp.square(x), (0, 1, 2), keepdims=True) - mean * mean
  return (x - mean) * lax.rsqrt(var + 1e-3)


FUNCTIONS = {
  'stride 1': convolve,
  'stride 2': lambda x: convolve(convolve(x, 2), 2),
  'stride 2, even padding': lambda x: convolve(x, 2, ((0, 1), (0, 1))),
  'no padding': lambda x: convolve(x, 1, ((0, 0), (0, 0))),
  'statistics': lambda x: normalised(convolve(x) + 3),
  'two layers': lambda x: jnp.mean(
    convolve(jax.nn.relu(normalised(convolve(x, 2))) + 1, 2), (1, 2)
  ),
  'maximum': lambda x: lax.reduce_window(
    x - 9, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  ),
  'average': lambda x: lax.reduce_window(
    x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  ) / 9,
  'shift and add': lambda x: models.layers.shift_and_add(
    x, jnp.ones((3, 3, 1, 3)), 2, ((1, 1), (1, 1))
  ),
  'reductions': lambda x: (
    jnp.max(x, (1, 2)), jnp.min(x, 1), jnp.sum(x), jnp.var(x, (1, 2))
  ),
  'squeeze and excite': lambda x: x * jax.nn.sigmoid(
    jnp.mean(x, (1, 2)) @ jnp.ones((3, 3))
  )[:, None, None],
  'along rows': lambda x: jnp.einsum('bhwc,bhvc->bwv', x, x),
  'both ways': lambda x: lax.cond(x[0, 0, 0, 0] > 0, convolve,
                                  lambda x: convolve(-x), x),
  'recomputed': lambda x: jax.checkpoint(lambda x: convolve(convolve(x, 2)))(x),
}  # fmt: skip


SLOW = (
  'stride 2, even padding', 'no padding', 'two layers', 'average',
  'squeeze and excite', 'along rows',
)  # fmt: skip


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=pytest.mark.slow if n in SLOW else ())
    for n in FUNCTIONS
  ],
)
def test_every_size_is_exact(name):
  agree(FUNCTIONS[name], sides=(5, 7, 8) if 'max' in name else SIDES)


@pytest.mark.parametrize('size', [3, 5])
def test_same_padding_is_exact_where_all_sides_are_even(size):
  """It pads one end alone there, at every one of them."""
  agree(lambda x: convolve(x, 2, 'SAME', size=size), sides=(4, 6, 8))


def test_by_hand():
  call = on_canvas(lambda x: jnp.mean(x), [(jnp.ones(n),) for n in (1, 2, 4)])
  x = jnp.array([1.0, 3.0, 5.0, 7.0])
  assert [float(call(k, x)) for k in range(3)] == [1.0, 2.0, 4.0]


def test_sizes_under_vmap_and_gradients_stop_at_the_border():
  fn = lambda x: jnp.sum(jnp.square(convolve(x, 2)))
  call = on_canvas(fn, [(image(side),) for side in SIDES])
  x = image(8)
  index = jnp.arange(4)
  found = jax.vmap(call, (0, None))(index, x)
  wanted = [fn(x[:, :side, :side]) for side in SIDES]
  np.testing.assert_allclose(found, jnp.stack(wanted), rtol=1e-5)
  grad = jax.grad(call, argnums=1)(1, x)
  own = jax.grad(fn)(x[:, :5, :5])
  np.testing.assert_allclose(grad[:, :5, :5], own, rtol=1e-4, atol=1e-5)
  assert not np.any(grad[:, 5:])
  assert not np.any(grad[:, :, 5:])


@pytest.mark.parametrize(
  'after',
  [
    lambda h: jax.nn.softmax(h, axis=-1),
    lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    lambda h: jnp.log(h * h) + jnp.abs(h) ** 0.5,
  ],
)
def test_gradients_are_those_of_the_image_where_zeros_have_none(after):
  """What is around it is 0 after the convolution, as it is before."""
  kernel = jax.random.normal(KEY, (3, 3, 3, 2))
  numbers = ('NHWC', 'HWIO', 'NHWC')

  def fn(kernel, x):
    h = lax.conv_general_dilated(
      x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers
    )
    return jnp.sum(after(h)[..., 0])

  call = on_canvas(fn, [(kernel, image(side)) for side in (4, 8)])
  found = jax.jit(jax.grad(call, argnums=1))(0, kernel, corner(image(4), 4))
  wanted = jax.jit(jax.grad(fn))(kernel, image(4))
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5)


def test_resizing_is_that_of_jax():
  x = image(8)
  run, traces = counted(lambda side: resize(x, side, 8))
  for side in (1, 3, 8):
    wanted = jax.image.resize(x, (2, side, side, 3), 'bilinear')
    found = run(side)
    np.testing.assert_allclose(found[:, :side, :side], wanted, atol=1e-5)
    assert not np.any(found[:, side:])
    assert not np.any(found[:, :, side:])
  assert len(traces) == 1


def test_features_are_resized_between_the_pixels_beside():
  x = jnp.array([1.0, 3.0, 8.0]).reshape(1, 1, 3, 1)
  row = lambda y: y[0, 0, :, 0].tolist()
  assert row(bilinear(x, (1, 3))) == [1.0, 3.0, 8.0]
  assert row(bilinear(x, (1, 1))) == [3.0]
  # Entries at -1/4, 1/4, 3/4, .. of the pixels, none outside of them.
  wanted = [1.0, 1.5, 2.5, 4.25, 6.75, 8.0]
  np.testing.assert_allclose(row(bilinear(x, (1, 6))), wanted, rtol=1e-6)
  # On a canvas only what was there is read.
  full = jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0)), constant_values=99.0)
  found = jax.jit(bilinear)(full, jnp.array([1, 6]), jnp.array([1, 3]))
  np.testing.assert_allclose(row(found), wanted, rtol=1e-6)
  images = image(8)  # Where it grows, as jax.image does.
  wanted = jax.image.resize(images, (2, 11, 9, 3), 'bilinear')
  np.testing.assert_allclose(bilinear(images, (11, 9)), wanted, atol=1e-5)


def test_every_part_has_a_size_of_its_own():
  first = jax.jit(lambda x: jax.nn.relu(convolve(x, 2)) + 1)
  last = jax.jit(lambda h: jnp.mean(convolve(h, 2), (1, 2)) + jnp.max(h))
  fn = lambda x: last(border(first(x)))
  call = on_canvas(fn, [(image(side),) for side in SIDES])
  run, traces = counted(call)
  for a, b in [(0, 3), (3, 1), (2, 2)]:
    x = image(SIDES[a], seed=a)
    h = first(x)
    size = -(-SIDES[b] // 2)  # What a convolution of stride 2 leaves.
    wanted = last(bilinear(h, (size, size)))
    found = run(jnp.array([a, b]), corner(x, SIDES[a]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  assert len(traces) == 1
  one = run(jnp.array([1, 1]), corner(image(5), 5))
  np.testing.assert_allclose(one, fn(image(5)), rtol=1e-5)
  with pytest.raises(ValueError, match=r'2 parts .* an index each,.* \(3,\)'):
    call(jnp.zeros(3, jnp.int32), image(8))


def flat(x):
  return x.reshape(2, -1)


REFUSED = {
  'same padding': (
    lambda x: convolve(x, 2, 'SAME'),
    'conv_general_dilated at canvas_test.py:.*padding is not the same',
  ),
  'a flat end': (flat, 'reshape at canvas_test.py:.*joins an axis'),
  'a parameter of that size': (
    lambda x: flat(x) @ jnp.ones((192, 2)),
    'cannot be traced at size 0 of 4',
  ),
  'the wrong way round': (
    lambda x: x[:, ::-1], 'rev at canvas_test.py:.*cannot tell the image',
  ),
  'another program': (
    lambda x: jnp.sin(x) if x.shape[1] > 5 else jnp.cos(x),
    'another program at another size, from sin at canvas_test.py:',
  ),
  'fewer operations': (
    lambda x: x if x.shape[1] > 5 else x + 1, 'fewer operations',
  ),
  'a sort': (lambda x: jnp.sort(x, 1), 'sort at .*cannot tell the image'),
  'the last row': (lambda x: x[:, -1], 'canvas_test.py:.*starts elsewhere|sl'),
  'a border of sums': (
    lambda x: border(jnp.sum(x, 3)), 'sizes can change between images alone',
  ),
  'a border inside': (
    lambda x: jax.checkpoint(lambda x: border(x) + 1)(x),
    'within which sizes cannot change',
  ),
  'a join': (
    lambda x: jnp.concatenate([x, x], 1), 'joins axes that depend on the size',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_has_no_canvas_is_refused_by_name(name):
  fn, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    on_canvas(fn, [(image(side),) for side in SIDES])


def test_the_last_example_is_the_largest():
  with pytest.raises(ValueError, match='must be the largest along every axis'):
    on_canvas(convolve, [(image(8),), (image(4),)])


_V1 = functools.partial(
  models.mobilenet_v1, 0.25, num_classes=3, blocks=(1, 2, 1, 1, 1), dropout=0.0
)
NETWORKS = {
  'resnet': (models.ResNet((4, 6), (1, 2), 3, stem='small'), (1, 7, 9, 10)),
  'bottlenecks': (
    models.ResNet((8, 16), (1, 2), 3, bottleneck=True, stem_channels=4),
    (19, 25, 32),
  ),
  'padded shortcuts': (
    models.ResNet((4, 6), (1, 2), 3, stem='small', shortcut='pad'), (7, 10),
  ),
  'wide': (models.WideResNet(10, 1, 3), (9, 14)),
  'mobilenet_v1': (_V1(tensorflow_padding=False, skippable=True), (21, 32)),
  'as in TensorFlow': (_V1(tensorflow_padding=True), (21, 26, 32)),
  'mobilenet_v2': (
    models.mobilenet_v2(0.25, num_classes=3, dropout=0.0), (21, 32),
  ),
  'mobilenet_v3': (
    models.mobilenet_v3_small(0.25, num_classes=3, dropout=0.0), (21, 32),
  ),
  'kernels of 5': (
    models.mobilenet_v3_small(
      0.25, num_classes=3, dropout=0.0, tensorflow_padding=True
    ),
    (33, 48),
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'batch'),
  [
    ('resnet', 1),
    pytest.param('resnet', 8, marks=pytest.mark.slow),
    *(pytest.param(n, 2, marks=pytest.mark.slow) for n in [*NETWORKS][1:]),
  ],
)
def test_networks_at_odd_sides(name, batch):
  """Strides of 2, down to single pixels, of which ResNets take statistics.

  Over two numbers these are rounding, multiplied: so they would be in a
  MobileNet here, and at a single pixel in a batch of 2.
  """
  model, sides = NETWORKS[name]
  train = not isinstance(model, models.MobileNet | models.MobileNetV1)
  x = jax.random.normal(KEY, (batch, sides[-1], sides[-1], 1))
  variables = jax.jit(model.init)(KEY, x)
  mutable = ['batch_stats'] if train else False
  fn = lambda v, x: model.apply(v, x, train=train, mutable=mutable)
  at = lambda side: jax.ShapeDtypeStruct((batch, side, side, 1), jnp.float32)
  call = on_canvas(fn, [(variables, at(side)) for side in sides])
  run, traces = counted(
    lambda k, v, x, side: call(k, v, resize(x, side, sides[-1]))
  )
  for k, side in enumerate(sides[:-1]):
    found = run(k, variables, x, side)
    wanted = jax.jit(fn)(variables, resize(x, side))
    for a, b in zip(
      jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
    ):
      scale = np.abs(b).max()
      np.testing.assert_allclose(a / scale, b / scale, atol=2e-5)
  assert len(traces) == 1
