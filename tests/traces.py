"""The law of one compilation, as a count of traces."""

import functools

import jax


def counted(fn, **options):
  """Returns fn under ``jax.jit`` and a list that grows with every trace."""
  traces = []

  @functools.wraps(fn)
  def call(*args, **kwargs):
    traces.append(1)
    return fn(*args, **kwargs)

  return jax.jit(call, **options), traces
