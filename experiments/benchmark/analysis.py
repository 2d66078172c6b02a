"""What the benchmark analyses: transformers as shapes, never computed.

``trace_bert_base`` is our BERT at its defaults, ``trace_llama`` a decoder of 24
layers with grouped queries, RMSNorm, rotary positions and SwiGLU. A trace is
JAX's own on shapes and ours of every axis, norms and attention rescaled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import models, structure

TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


class Sizes(NamedTuple):
  """The widths of a decoder."""

  vocabulary: int = 32000
  layers: int = 24
  hidden: int = 2048
  pairs: int = 4  # Heads of keys and values.
  queries: int = 8  # Heads of queries for each of them.
  head: int = 64
  inner: int = 5632


def llama_params(sizes: Sizes) -> Any:
  """Returns the shapes of a decoder's params, in float32."""
  heads = sizes.pairs * sizes.queries * sizes.head
  layer = {
    'attention_norm': (sizes.hidden,),
    'q': (sizes.hidden, heads),
    'k': (sizes.hidden, sizes.pairs * sizes.head),
    'v': (sizes.hidden, sizes.pairs * sizes.head),
    'o': (heads, sizes.hidden),
    'inner_norm': (sizes.hidden,),
    'gate': (sizes.hidden, sizes.inner),
    'up': (sizes.hidden, sizes.inner),
    'down': (sizes.inner, sizes.hidden),
  }
  shapes = {
    'embedding': (sizes.vocabulary, sizes.hidden),
    **{f'layer{k}': layer for k in range(sizes.layers)},
    'norm': (sizes.hidden,),
    'head': (sizes.hidden, sizes.vocabulary),
  }
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def llama(params: Any, tokens: jax.Array, sizes: Sizes) -> jax.Array:
  """Returns the logits of a decoder of the form of LLaMA.

  Touvron et al. (2023, arXiv:2302.13971), with the grouped queries of Ainslie
  et al. (2023, arXiv:2305.13245).

  Args:
    params: of :func:`llama_params`.
    tokens: int32, shape (batch, length).
    sizes: those of the params.

  Returns:
    float32, shape (batch, length, vocabulary).
  """
  x = params['embedding'][tokens]
  for k in range(sizes.layers):
    layer = params[f'layer{k}']
    x = x + _attend(layer, _norm(x, layer['attention_norm']), sizes)
    y = _norm(x, layer['inner_norm'])
    y = jax.nn.silu(y @ layer['gate']) * (y @ layer['up'])
    x = x + y @ layer['down']
  return _norm(x, params['norm']) @ params['head']


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  variance = jnp.mean(jnp.square(x), -1, keepdims=True)
  return x * jax.lax.rsqrt(variance + 1e-6) * scale


def _attend(layer: Any, x: jax.Array, sizes: Sizes) -> jax.Array:
  batch, length, _ = x.shape
  shape = (batch, length, sizes.pairs, -1, sizes.head)
  q, k, v = ((x @ layer[name]).reshape(shape) for name in ('q', 'k', 'v'))
  scores = jnp.einsum('nqghk,nsgik->nghqs', _rotate(q), _rotate(k))
  scores = scores / np.sqrt(sizes.head)
  future = np.triu(np.ones((length, length), bool), 1)
  weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores))
  mixed = jnp.einsum('nghqs,nsgik->nqghk', weights, v)
  return mixed.reshape(batch, length, -1) @ layer['o']


def _rotate(x: jax.Array) -> jax.Array:
  """Turns pairs of channels by angles that grow with the position."""
  length, half = x.shape[1], x.shape[-1] // 2
  angles = np.outer(np.arange(length), 1e4 ** (-np.arange(half) / half))
  cos, sin = (
    f(angles)[:, None, None].astype(x.dtype) for f in (np.cos, np.sin)
  )
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def call(row: str) -> Callable[[], structure.Graph]:
  """Returns what a row measures: the analysis of a network, from nothing.

  Args:
    row: one of ``ROWS``.
  """
  if row == 'trace_bert_base':
    module = models.BERT()
    fn = module.apply
    params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
  else:
    sizes = Sizes()
    fn = lambda params, tokens: llama(params, tokens, sizes)
    params = llama_params(sizes)

  def analyse() -> structure.Graph:
    anew = lambda params, tokens: fn(params, tokens)  # No trace of it is kept.
    return structure.trace(anew, params, TOKENS, reductions='rescale')

  return analyse


ROWS = ('trace_bert_base', 'trace_llama')
