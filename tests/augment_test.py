import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.data import augment


@pytest.fixture(scope='module')
def images():
  return jax.random.uniform(jax.random.key(1), (64, 6, 5, 2), minval=0.5)


def test_pixel_statistics_equal_numpy():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
  mean, deviation = augment.pixel_statistics(images)
  np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(deviation, images.std((0, 1, 2)), rtol=1e-6)


def test_normalise_each_channel_and_dtype():
  images = jnp.array([[[[10, 20]]]], jnp.uint8)
  out = augment.normalise(images, (8.0, 10.0), (2.0, 5.0), jnp.bfloat16)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, np.array([[[[1.0, 2.0]]]]))


def test_flip_mirrors_half_of_the_images(images):
  out = np.asarray(jax.jit(augment.random_flip)(jax.random.key(0), images))
  same = (out == images).all((1, 2, 3))
  mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
  assert (same ^ mirrored).all()
  assert 16 <= same.sum() <= 48


def test_crop_shifts_within_the_padding(images):
  crop = jax.jit(functools.partial(augment.random_crop, padding=1))
  out = np.asarray(crop(jax.random.key(0), images))
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  seen = set()
  for image, source in zip(out, padded, strict=True):
    places = [
      (i, j)
      for i in range(3)
      for j in range(3)
      if (source[i : i + 6, j : j + 5] == image).all()
    ]
    assert len(places) == 1
    seen.update(places)
  assert len(seen) == 9
  np.testing.assert_array_equal(
    augment.random_crop(jax.random.key(0), images, padding=0), images
  )


def test_cutout_zeroes_a_square_around_every_pixel(images):
  out = np.asarray(augment.cutout(jax.random.key(0), images, side=3))
  corners = set()
  for image, source in zip(out, np.asarray(images), strict=True):
    hole = (image == 0).all(-1)
    np.testing.assert_array_equal(image[~hole], source[~hole])
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    assert hole.sum() == len(rows) * len(columns)
    assert 2 <= len(rows) <= 3
    assert 2 <= len(columns) <= 3
    corners.add((rows[0], rows[-1]))
  # Centres 0..5 of 6 rows: the hole sticks out at either end.
  assert corners == {(0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5)}


def test_mixup_mixes_images_and_targets_alike():
  images = jnp.arange(8.0)[:, None, None, None] * jnp.ones((8, 2, 2, 1))
  targets = jnp.eye(8)
  mixed, shares = jax.jit(augment.mixup)(jax.random.key(3), images, targets)
  np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
  np.testing.assert_allclose(
    mixed[:, 0, 0, 0], shares @ jnp.arange(8.0), rtol=1e-5, atol=1e-6
  )
  own = np.diag(shares)
  assert len({round(float(x), 6) for x in own} - {1.0}) == 1


def test_augmentation_follows_its_key(images):
  for fn in (
    augment.random_flip,
    augment.random_crop,
    functools.partial(augment.cutout, side=3),
  ):
    a, b = (fn(jax.random.key(k), images) for k in (0, 1))
    np.testing.assert_array_equal(a, fn(jax.random.key(0), images))
    assert (a != b).any()


@pytest.mark.parametrize(
  ('call', 'text'),
  [
    (lambda k, x: augment.random_crop(k, x, -1), '`padding` must be at least'),
    (
      lambda k, x: augment.cutout(k, x, -1),
      '`side` must be at least 0, got -1',
    ),
    (lambda k, x: augment.mixup(k, x, x, 0), '`alpha` must be above 0, got 0'),
  ],
)
def test_errors(images, call, text):
  with pytest.raises(ValueError, match=text):
    call(jax.random.key(0), images)


def test_center_crop_is_the_middle():
  # A horizontal ramp keeps its middle: 16 wide, cut to 14, resized to 7.
  image = np.uint8(np.arange(16) * 10)[None, :, None] * np.ones(
    (16, 1, 3), 'u1'
  )
  out = augment.center_crop(image, side=7)
  assert out.shape == (7, 7, 3)
  np.testing.assert_allclose(out[3, :, 0], 15 + 20.0 * np.arange(7), atol=6)
  np.testing.assert_allclose(out[3, 3, 0], 75, atol=1)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [(9, 30), (30, 9), (1, 40)])
def test_random_resized_crop(size, channels):
  image = np.random.default_rng(0).integers(0, 256, (*size, channels), 'u1')
  crop = functools.partial(augment.random_resized_crop, side=6)
  a, b, c = (crop(image, np.random.default_rng(s)) for s in (0, 0, 1))
  assert a.shape == (6, 6, channels)
  assert a.dtype == np.uint8
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


@pytest.mark.parametrize('devices', [2, 4])
def test_augmentation_is_the_same_on_any_number_of_devices(images, devices):
  @jax.jit
  def augmented(key, images):
    keys = jax.random.split(key, 3)
    images = augment.random_flip(keys[0], images)
    images = augment.random_crop(keys[1], images, padding=1)
    return augment.cutout(keys[2], images, side=2)

  mesh = jax.make_mesh(
    (devices,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  one = augmented(jax.random.key(0), images)
  many = augmented(jax.random.key(0), jax.device_put(images, rows))
  np.testing.assert_array_equal(one, many)
