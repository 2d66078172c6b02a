"""The BERT encoder with a classification head."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxprune.models import layers
from jaxprune.models.layers import Array, Keep


class EncoderLayer(nn.Module):
  """Attention and two dense layers, each added and then normalised.

  Attributes:
    widths: of query, key, value and intermediate.
    head_dim: channels of one attention head.
    dropout: rate in training.
    epsilon: of the layer norms.
    dtype: dtype of the computation; parameters are float32.
  """

  widths: Sequence[int]
  head_dim: int
  dropout: float
  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array, train: bool) -> Array:
    """Returns the layer's output; shape that of x, (batch, length, hidden).

    Args:
      x: float, shape (batch, length, hidden).
      mask: bool, shape (batch, length); False is padding, read by none.
      train: static; drop out.
    """
    dense = functools.partial(_dense, dtype=self.dtype)
    norm = functools.partial(nn.LayerNorm, self.epsilon, dtype=self.dtype)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
    names = ('query', 'key', 'value')
    q, k, v = (
      split(dense(width, name=name)(x))
      for width, name in zip(self.widths, names, strict=False)
    )
    logits = jnp.einsum('bqhd,bkhd->bhqk', q, k) * self.head_dim**-0.5
    logits = logits.astype(jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    attention = drop(jax.nn.softmax(logits).astype(self.dtype))
    y = jnp.einsum('bhqk,bkhd->bqhd', attention, v)
    y = y.reshape(*y.shape[:2], -1)
    y = drop(dense(x.shape[-1], name='attention_output')(y))
    x = norm(name='attention_norm')(x + y)
    y = dense(self.widths[3], name='intermediate')(x)
    y = nn.gelu(y, approximate=False)
    y = drop(dense(x.shape[-1], name='output')(y))
    return norm(name='output_norm')(x + y)


class BERT(nn.Module):
  """The BERT encoder with a pooler and a classifier.

  Devlin et al. (2018, arXiv:1810.04805). The layers with a kernel are
  ``layer{i}/query``, ``/key``, ``/value``, ``/attention_output``,
  ``/intermediate`` and ``/output``, ``pooler`` and ``head``; each encoder layer
  is a stage. The defaults are BERT-base, uncased.

  Attributes:
    vocab_size: number of tokens.
    hidden: width of the residual stream.
    depth: number of encoder layers.
    heads: attention heads of a layer.
    intermediate: width between the two dense layers.
    positions: longest sequence.
    types: number of token types.
    num_classes: width of the last dense layer.
    head_dim: channels of one head; by default hidden / heads.
    dropout: rate in training; needs the rng 'dropout'.
    epsilon: of the layer norms.
    widths: path of a layer -> width, where it is not the one above. Those of
      query, key and value are heads left times ``head_dim``.
    drop: names of encoder layers to leave out, any of them.
    remat: recompute each encoder layer in the backward pass.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  vocab_size: int = 30522
  hidden: int = 768
  depth: int = 12
  heads: int = 12
  intermediate: int = 3072
  positions: int = 512
  types: int = 2
  num_classes: int = 2
  head_dim: int | None = None
  dropout: float = 0.1
  epsilon: float = 1e-12
  widths: Mapping[str, int] = field(default_factory=dict)
  drop: Sequence[str] = ()
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return self.depth

  @property
  def bypassable(self) -> list[str]:
    """Names of the encoder layers, each of which can be skipped."""
    return [f'layer{i}' for i in range(1, self.depth + 1)]

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    *,
    mask: Array | None = None,
    types: Array | None = None,
    start: int = 0,
    stop: int | None = None,
    keep: Keep | None = None,
  ) -> Array:
    """Returns the logits, or the features after an encoder layer.

    Args:
      x: tokens; int, shape (batch, length), in 0..vocab_size-1, or the features
        that enter layer ``start``; float, shape (batch, length, hidden). Under
        ``jit`` nothing checks the values: a token that is none gives NaN.
      train: static; drop out.
      mask: bool or int, shape (batch, length); False or 0 is padding. By
        default there is none.
      types: int, shape (batch, length), in 0..types-1; by default 0. Checked
        as the tokens are.
      start: first encoder layer to run; 0 also runs the embeddings. Static.
      stop: layer to stop before; None, or their number, also runs the pooler
        and the head. Static.
      keep: name of a layer -> bool, of those in ``bypassable``; False skips it.
        A Python bool is static, an array may be traced.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if ``hidden`` is no multiple of ``heads``, if the sequence is
        longer than ``positions``, if a token or a type is none, if ``mask`` or
        ``types`` is of another shape than the tokens, if the widths of query,
        key and value differ or are no multiple of ``head_dim``, or if
        ``widths``, ``drop`` or ``keep`` name what is not there.
      TypeError: if tokens are not integers.
    """
    if self.head_dim is None and self.hidden % self.heads:
      raise ValueError(
        f'`hidden` must be a multiple of `heads`, got {self.hidden} and '
        f'{self.heads}; or give `head_dim`.'
      )
    keep = layers.kept(keep, self.drop, self.bypassable)
    stop = layers.check_stages(start, stop, self.num_stages)
    if start == 0:
      x = self._embed(x, types, train)
    shape = x.shape[:2]
    if mask is None:
      mask = jnp.ones(shape, bool)
    _check_shape('mask', mask, shape)
    mask = mask.astype(bool)
    layer = EncoderLayer
    layer = nn.remat(layer, static_argnums=(3,)) if self.remat else layer
    for i in range(start + 1, stop + 1):
      name = f'layer{i}'
      sizes, head_dim = self._sizes(name)
      run = layer(
        sizes, head_dim, self.dropout, self.epsilon, self.dtype, name=name
      )
      x = layers.bypass(run, x, mask, train, keep=keep.get(name, True))
    if stop == self.num_stages:
      drop = nn.Dropout(self.dropout, deterministic=not train)
      width = self.widths.get('pooler', self.hidden)
      x = nn.tanh(_dense(width, self.dtype, name='pooler')(x[:, 0]))
      classes = self.widths.get('head', self.num_classes)
      x = _dense(classes, self.dtype, name='head')(drop(x))
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x

  def _embed(self, x: Array, types: Array | None, train: bool) -> Array:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
      raise TypeError(
        f'Tokens must be integers of shape (batch, length), got {x.dtype} of '
        f'shape {x.shape}.'
      )
    if x.shape[1] > self.positions:
      raise ValueError(
        f'A sequence may have at most {self.positions} tokens (`positions`), '
        f'got {x.shape[1]}.'
      )
    types = jnp.zeros_like(x) if types is None else types
    _check_shape('types', types, x.shape)
    _check_ids('Tokens', x, self.vocab_size, 'vocab_size')
    _check_ids('Token types', types, self.types, 'types')
    embed = lambda count, name: nn.Embed(
      count,
      self.hidden,
      dtype=self.dtype,
      embedding_init=nn.initializers.normal(0.02),
      name=name,
    )
    places = jnp.arange(x.shape[1])[None]
    y = embed(self.vocab_size, 'words')(x) + embed(self.types, 'types')(types)
    y = y + embed(self.positions, 'positions')(places)
    y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name='embedding_norm')(y)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _sizes(self, name: str) -> tuple[tuple[int, ...], int]:
    """Returns the widths of query, key, value, intermediate; and a head's."""
    head_dim = self.head_dim or self.hidden // self.heads
    given = lambda layer, n: self.widths.get(f'{name}/{layer}', n)
    parts = ('query', 'key', 'value')
    inner = [given(part, self.heads * head_dim) for part in parts]
    if len(set(inner)) > 1 or inner[0] % head_dim:
      raise ValueError(
        f'The widths of {name}/query, key and value must be one multiple of '
        f'{head_dim} (`head_dim`), got {", ".join(map(str, inner))}.'
      )
    return (*inner, given('intermediate', self.intermediate)), head_dim


def _check_shape(what: str, x: Array, shape: tuple[int, ...]) -> None:
  if x.shape != shape:
    raise ValueError(
      f'`{what}` must have the shape (batch, length) of the tokens, '
      f'{shape}, got {x.shape}.'
    )


def _check_ids(what: str, ids: Array, count: int, argument: str) -> None:
  """Raises ValueError unless ids, if their values are known, are below count.

  An embedding gives NaN for the others.
  """
  known = not isinstance(ids, core.Tracer)
  if not (known and ids.size and getattr(ids, 'is_fully_addressable', True)):
    return
  values = np.asarray(ids)  # Not by JAX, which would stage it inside a trace.
  low, high = values.min(), values.max()
  if low < 0 or high >= count:
    raise ValueError(
      f'{what} must be in 0..{count - 1} (`{argument}`), got {low}..{high}.'
    )


def _dense(width: int, dtype: Any, name: str) -> nn.Dense:
  init = nn.initializers.normal(0.02)
  return nn.Dense(width, dtype=dtype, kernel_init=init, name=name)


bert_base = BERT
bert_large = functools.partial(
  BERT, hidden=1024, depth=24, heads=16, intermediate=4096
)
