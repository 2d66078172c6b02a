"""Strict JAX for every test: four CPU devices, no silent rank promotion."""

import os

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
)

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
