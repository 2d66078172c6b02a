"""Counts, shapes, stages and bypasses of the networks."""

import jax
import jax.numpy as jnp
import pytest

from jaxprune import models

KEY = jax.random.key(0)


def shapes(model, *inputs, **options):
  """Returns the variables of a network as shapes; nothing is computed."""
  init = lambda key, *xs: model.init(key, *xs, **options)
  return jax.eval_shape(init, KEY, *inputs)


def images(side, channels=3, batch=2):
  return jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)


def test_a_network_is_built_again_at_the_widths_of_its_params():
  given = {'stem': 5, 'stage2_block1/conv1': 3, 'stage2_block1/conv2': 7}
  params = shapes(models.resnet_digits(widths=given), images(8, 1))['params']
  again = models.resnet_digits(widths=models.widths(params))
  assert shapes(again, images(8, 1))['params'] == params
  assert params['stage1_block1']['conv2']['kernel'].shape == (3, 3, 16, 5)
  assert params['stage2_block1']['shortcut']['kernel'].shape == (1, 1, 5, 7)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'stage9/conv': 3}, "names 'stage9/conv', and ResNet has no such layer"),
    ({'stage1_block1/conv2': 3}, "'stage1_block1/conv2' must be 16, got 3"),
  ],
)
def test_a_width_that_cannot_be_is_named(given, message):
  with pytest.raises(ValueError, match=message):
    shapes(models.resnet_digits(widths=given), images(8, 1))
