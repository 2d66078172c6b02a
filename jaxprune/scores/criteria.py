"""Scores: how much each weight matters. Larger = keep.

Each function returns a pytree like ``params`` that holds a score wherever the
leaf is prunable and ``optax.MaskedNode()`` elsewhere. Those of the first half
look at the weights, or at gradients that the caller has; those of the second
half take the loss and batches. Lookahead scores are in
:mod:`jaxprune.scores.lookahead`.

Every score of a tree keeps the order of what its formula gives, for weights of
every size that float32 holds, subnormal ones included: products are formed
over powers of two, and where the largest would leave 1e-29 to 1e36 all scores
come out by one power of two larger or smaller. What that cannot mend: an entry
1e-38 times the largest product (1e-19 times, where the score is a square)
counts as 0 and ranks by position; ``taylor`` and ``obd`` of 'fisher' square
gradients, and ``wanda`` inputs, which must lie between 1e-18 and 1e18;
``movement``, a sum over steps, is plain products. Leaves of float64 are scored
in float64.

A ``which`` argument says which leaves to score, as for
:func:`jaxprune.tree.prunable`; wherever it is taken, ValueError is raised if a
rule in it matches no path or if no leaf is left.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune import checks, distributions, tree
from jaxprune.checks import kinds
from jaxprune.numerics import averages, floats, sharding

Loss = Callable[[Any, Any], jax.Array]  # (params, batch) -> mean loss, scalar.
Hessian = Literal['exact', 'hutchinson', 'fisher']


@kinds.checked
def magnitude(params: tree.PyTree, which: tree.Which = None) -> tree.PyTree:
  """Returns the magnitude |w| of each prunable weight, in its own dtype.

  Args:
    params: a pytree of arrays.
    which: the leaves to score, as for :func:`jaxprune.tree.prunable`.

  Returns:
    A pytree like ``params``: |w|, or ``optax.MaskedNode()`` where a leaf stays
    dense.

  Raises:
    ValueError: if a rule matches no path, or if no leaf is left to prune.

  References:
    Han et al. (2015), arXiv:1506.02626.

  Examples:
    >>> print(magnitude({'kernel': jnp.array([[3.0, -1.0]])})['kernel'])
    [[3. 1.]]
  """
  return jax.tree.map(jnp.abs, tree.prunable(params, which))


@kinds.checked
def random(
  key: jax.Array, params: tree.PyTree, which: tree.Which = None
) -> tree.PyTree:
  """Returns scores drawn uniformly from [0, 1), float32.

  Args:
    key: a PRNG key; a leaf's scores depend on it and on the leaf's place.
    params: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    which: the leaves to score.

  Examples:
    >>> random(jax.random.key(0), {'kernel': jnp.ones((2, 3))})['kernel'].shape
    (2, 3)
  """
  chosen = tree.prunable(params, which)
  leaves, treedef = jax.tree.flatten(chosen)
  keys = jax.random.split(key, len(leaves))
  return treedef.unflatten(
    [jax.random.uniform(keys[i], w.shape) for i, w in enumerate(leaves)]
  )


@kinds.checked
def lamp(params: tree.PyTree, which: tree.Which = None) -> tree.PyTree:
  """Returns layer-adaptive magnitudes, comparable between leaves.

  score(w_u) = w_u^2 / sum of w_v^2 over |w_v| >= |w_u| in the same leaf. The
  order within a leaf is that of the magnitudes, the lower index first among
  equals; the largest scores 1, so that one threshold for all leaves empties
  none. It sorts each leaf: the sums need the whole order.

  Args:
    params: a pytree of arrays.
    which: the leaves to score.

  Returns:
    A pytree like ``params``, float32 or wider, in [0, 1].

  References:
    Lee et al. (2021), arXiv:2010.07611, Eq. 4; confirmed from the authors'
    code, which subtracts prefix sums where this adds from the largest on.

  Examples:
    >>> print(lamp({'kernel': jnp.array([[1.0, -2.0, 0.0]])})['kernel'])
    [[0.2 1.  0. ]]
  """
  survive = lambda w: distributions.survival(jnp.abs(w))
  return jax.tree.map(survive, tree.prunable(params, which))


@kinds.checked
def norm_scale(params: tree.PyTree, which: tree.Which = None) -> tree.PyTree:
  """Returns |gamma|, the score of each channel by the norm that follows it.

  Args:
    params: a pytree of arrays.
    which: the scales of the norms; by default every leaf named ``scale``.

  References:
    Liu et al. (2017), arXiv:1708.06519.

  Examples:
    >>> print(norm_scale({'bn': {'scale': jnp.array([0.5, -2.0])}})['bn'])
    {'scale': Array([0.5, 2. ], dtype=float32)}
  """
  if which is None:
    which = lambda path, _: path.rsplit('/', 1)[-1] == 'scale'
  return magnitude(params, which)


@kinds.checked
def fpgm(
  params: tree.PyTree, which: tree.Which = None, *, axis: int = -1
) -> tree.PyTree:
  """Returns the distance of each filter from all others of its leaf.

  score(filter j) = sum_k ||W_j - W_k||_2, the same for all of its weights: the
  filters nearest to the geometric median are the ones to go.

  Args:
    params: a pytree of arrays.
    which: the leaves to score.
    axis: the axis that counts filters; -1 for Flax.

  References:
    He et al. (2019), arXiv:1811.00250, Eq. 7.

  Examples:
    >>> w = jnp.array([[0.0, 1.0, 3.0]])
    >>> print(fpgm({'kernel': w})['kernel'])
    [[4. 3. 5.]]
  """

  def score(w):
    filters = jnp.moveaxis(sharding.whole(w), axis, 0)
    filters, exponent = floats.split(filters.reshape(w.shape[axis], -1))[0]
    far = lambda f: jnp.sum(jnp.linalg.norm(filters - f[None], axis=1))
    shape = [1] * w.ndim
    shape[axis] = w.shape[axis]
    scores = floats.join(floats.Scaled(lax.map(far, filters), exponent))
    scores = scores.reshape(shape)
    return sharding.like(jnp.broadcast_to(scores, w.shape), w)

  return jax.tree.map(score, tree.prunable(params, which))


@kinds.checked
def saliency(
  params: tree.PyTree, grads: tree.PyTree, which: tree.Which = None
) -> tree.PyTree:
  """Returns |w g|, the change of the loss to first order without the weight.

  Args:
    params: a pytree of arrays.
    grads: dL/dw, like ``params``; raw, not what an optimizer made of it.
    which: the leaves to score.

  References:
    Mozer and Smolensky (1989); Lee et al. (2019), arXiv:1810.02340, Eq. 5.

  Examples:
    >>> params = {'kernel': jnp.array([[3.0, -1.0]])}
    >>> print(saliency(params, params)['kernel'])
    [[9. 1.]]
  """
  chosen = tree.prunable(params, which)
  tree.check_alike('Gradients', grads, params, shapes=True)
  return jax.tree.map(
    jnp.abs, floats.products(chosen, tree.restrict(grads, chosen))
  )


@kinds.checked
def movement(
  params: tree.PyTree,
  grads: tree.PyTree,
  previous: tree.PyTree | None = None,
  which: tree.Which = None,
) -> tree.PyTree:
  """Returns movement scores: how far gradients push weights away from zero.

  S_t = S_(t-1) - w g, summed over the steps of training.

  Args:
    params: a pytree of arrays.
    grads: dL/dw, like ``params``, at this step.
    previous: the scores so far; zero if None.
    which: the leaves to score.

  References:
    Sanh, Wolf and Rush (2020), arXiv:2005.07683, Eq. 3, without the learning
    rate, which changes no order.

  Examples:
    >>> params = {'kernel': jnp.array([[3.0, -1.0]])}
    >>> grads = {'kernel': jnp.array([[0.5, 0.5]])}
    >>> print(movement(params, grads)['kernel'])
    [[-1.5  0.5]]
  """
  chosen = tree.prunable(params, which)
  tree.check_alike('Gradients', grads, params, shapes=True)
  grads = tree.restrict(grads, chosen)
  step = jax.tree.map(lambda w, g: -floats.wide(w) * g, chosen, grads)
  return step if previous is None else jax.tree.map(jnp.add, previous, step)


# Scores that need the loss and data.


@kinds.checked
def snip(
  loss: Loss,
  params: tree.PyTree,
  batches: Iterable[Any],
  which: tree.Which = None,
) -> tree.PyTree:
  """Returns connection sensitivities |w g|, g the gradient over all batches.

  Args:
    loss: (params, batch) -> mean loss of the batch, a scalar.
    params: a pytree of arrays; for SNIP at initialisation.
    batches: any iterable of batches of one shape; read once.
    which: the leaves to score.

  Raises:
    ValueError: if there is no batch, or as the module says.

  References:
    Lee et al. (2019), arXiv:1810.02340, Eq. 5, not normalised: a common factor
    changes no order.

  Examples:
    >>> loss = lambda p, x: jnp.sum(p['kernel'] * x)
    >>> w = {'kernel': jnp.array([[3.0, -1.0]])}
    >>> batches = [jnp.array([[1.0, 1.0]]), jnp.array([[-1.0, 1.0]])]
    >>> print(snip(loss, w, batches))
    {'kernel': Array([[0., 1.]], dtype=float32)}
  """
  chosen = tree.prunable(params, which)
  grads = averages.mean(_gradient(loss), params, chosen, batches)
  return jax.tree.map(jnp.abs, floats.products(chosen, grads))


@kinds.checked
def taylor(
  loss: Loss,
  params: tree.PyTree,
  batches: Iterable[Any],
  which: tree.Which = None,
) -> tree.PyTree:
  """Returns the mean over batches of (w g)^2.

  Args:
    loss: (params, batch) -> mean loss of the batch, a scalar.
    params: a pytree of arrays.
    batches: any iterable of batches of one shape; read once.
    which: the leaves to score.

  Raises:
    ValueError: if there is no batch, or as the module says.

  References:
    Molchanov et al. (2019), arXiv:1906.10771, Eq. 8.

  Examples:
    >>> loss = lambda p, x: jnp.sum(p['kernel'] * x)
    >>> w = {'kernel': jnp.array([[3.0, -1.0]])}
    >>> batches = [jnp.array([[1.0, 1.0]]), jnp.array([[-1.0, 1.0]])]
    >>> print(taylor(loss, w, batches))
    {'kernel': Array([[9., 1.]], dtype=float32)}
  """
  chosen = tree.prunable(params, which)
  gradient = _gradient(loss)

  def squares(params, chosen, batch):
    grads = gradient(params, chosen, batch)
    return jax.tree.map(lambda g: jnp.square(floats.wide(g)), grads)

  return floats.products(
    chosen, chosen, averages.mean(squares, params, chosen, batches)
  )


@kinds.checked
def obd(
  loss: Loss,
  params: tree.PyTree,
  batches: Iterable[Any],
  which: tree.Which = None,
  *,
  hessian: Hessian = 'hutchinson',
  key: jax.Array | None = None,
  samples: int = 1,
) -> tree.PyTree:
  """Returns h w^2 / 2, the change of the loss to second order, OBD.

  h is the diagonal of the Hessian, a mean over batches. For OBD+LAP give the
  result to :func:`jaxprune.scores.lookahead.obd`.

  Args:
    loss: (params, batch) -> mean loss of the batch, a scalar.
    params: a pytree of arrays.
    batches: any iterable of batches of one shape; read once.
    which: the leaves to score.
    hessian: ``'exact'``: one Hessian-vector product per weight and batch, for
      small nets; ``'hutchinson'``: the mean of v * Hv over random signs v,
      which is h on average and may fall below 0; ``'fisher'``: the mean square
      of the gradient of each sample, never negative, for a loss that is a
      negative log-likelihood, with the samples on each array's first axis.
    key: a PRNG key, for ``'hutchinson'``.
    samples: how many v per batch, for ``'hutchinson'``; static.

  Raises:
    TypeError: if samples is no integer.
    ValueError: if there is no batch, if hutchinson has no key, if hessian is
      unknown, if samples is below 1, or as the module says.

  References:
    LeCun, Denker and Solla (1989), Eq. 5; Hutchinson (1989) and Bekas et al.
    (2007) for the estimate of a diagonal.

  Examples:
    >>> loss = lambda p, x: jnp.sum(x * p['kernel'] ** 2)
    >>> w = {'kernel': jnp.array([[3.0, -1.0]])}
    >>> batches = [jnp.array([[1.0, 2.0]])]
    >>> print(obd(loss, w, batches, hessian='exact')['kernel'])
    [[9. 2.]]
  """
  chosen = tree.prunable(params, which)
  gradient = _gradient(loss)

  def exact(params, chosen, batch):
    return _diagonal(_product(gradient, params, chosen, batch), chosen)

  def hutchinson(params, chosen, batch):
    key, batch = batch
    product = _product(gradient, params, chosen, batch)

    def sample(key):
      v = optax.tree.random_like(key, chosen, jax.random.rademacher)
      return jax.tree.map(lambda v, h: v * floats.wide(h), v, product(v))

    keys = jax.random.split(key, samples)
    return jax.tree.map(lambda x: x.mean(0), lax.map(sample, keys))

  def fisher(params, chosen, batch):
    def squares(sample):
      alone = jax.tree.map(lambda x: x[None], sample)
      grads = gradient(params, chosen, alone)
      return jax.tree.map(lambda g: jnp.square(floats.wide(g)), grads)

    return jax.tree.map(lambda x: x.mean(0), jax.vmap(squares)(batch))

  checks.whole('samples', samples, 1)
  ways = {'exact': exact, 'hutchinson': hutchinson, 'fisher': fisher}
  if hessian not in ways:
    raise ValueError(f'`hessian` is one of {list(ways)}, got {hessian!r}.')
  if hessian == 'hutchinson':
    if key is None:
      raise ValueError("hessian='hutchinson' draws random signs: give a `key`.")
    keyed = enumerate(batches)
    batches = ((jax.random.fold_in(key, i), batch) for i, batch in keyed)
  h = averages.mean(ways[hessian], params, chosen, batches)
  half = jax.tree.map(lambda h: 0.5 * h, h)
  return floats.products(half, chosen, chosen)


@kinds.checked
def grasp(
  loss: Loss,
  params: tree.PyTree,
  batches: Iterable[Any],
  which: tree.Which = None,
) -> tree.PyTree:
  """Returns w * Hg, by which removing a weight lowers the gradient flow.

  g is the gradient over all batches, H the Hessian over all batches; the
  change of g'g when w goes is -2 w * Hg to first order.

  Args:
    loss: (params, batch) -> mean loss of the batch, a scalar. The authors
      divide the logits by 200.
    params: a pytree of arrays; for GraSP at initialisation.
    batches: batches of one shape; held in memory, for they are read twice.
    which: the leaves to score.

  Raises:
    ValueError: if there is no batch, or as the module says.

  References:
    Wang, Zhang and Grosse (2020), arXiv:2002.07376, Eq. 8, with the sign of
    their code: the largest are kept.

  Examples:
    >>> loss = lambda p, x: jnp.sum(x * p['kernel'] ** 2)  # g = 2wx, H = 2x
    >>> w = {'kernel': jnp.array([[3.0, -1.0]])}
    >>> print(grasp(loss, w, [jnp.array([[1.0, 2.0]])])['kernel'])
    [[36. 16.]]
  """
  batches = tuple(batches)
  chosen = tree.prunable(params, which)
  gradient = _gradient(loss)
  grads = averages.mean(gradient, params, chosen, batches)

  def flow(params, chosen, batch):
    weights, grads = chosen
    grads = jax.tree.map(lambda w, g: g.astype(w.dtype), weights, grads)
    return _product(gradient, params, weights, batch)(grads)

  product = averages.mean(flow, params, (chosen, grads), batches)
  return floats.products(chosen, product)


@kinds.checked
def synflow(
  apply_fn: Callable[[Any, Any], Any],
  params: tree.PyTree,
  inputs: tree.Arrays,
  which: tree.Which = None,
) -> tree.PyTree:
  """Returns the synaptic flow |w| dR/d|w|, R the sum of outputs, without data.

  R = sum of apply_fn(|params|, ones). The authors prune in 100 rounds to a
  density of d^(k/100), scoring anew in each.

  Args:
    apply_fn: (params, inputs) -> outputs, in eval form and without norms that
      subtract a mean.
    params: a pytree of arrays.
    inputs: arrays, or ``jax.ShapeDtypeStruct``, of the shape of one input.
    which: the leaves to score.

  References:
    Tanaka et al. (2020), arXiv:2006.05467, Eq. 1 and Algorithm 1.

  Examples:
    >>> apply_fn = lambda p, x: x @ p['a'] @ p['b']
    >>> params = {'a': jnp.array([[1.0, -2.0]]), 'b': jnp.array([[3.0], [1.0]])}
    >>> print(synflow(apply_fn, params, jnp.ones((1, 1)), lambda *_: True)['a'])
    [[3. 2.]]
  """
  ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)
  floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
  sizes = jax.tree.map(lambda x: jnp.abs(x) if floating(x) else x, params)
  outputs = lambda params, x: jax.tree.leaves(apply_fn(params, x))
  total = lambda params, x: jnp.sum(
    jnp.stack([jnp.sum(y) for y in outputs(params, x)])
  )
  chosen = tree.prunable(sizes, which)
  grads = _gradient(total)(sizes, chosen, ones)
  return jax.tree.map(jnp.abs, floats.products(chosen, grads))


@kinds.checked
def wanda(
  capture: Callable[[Any, Any], Mapping[str, jax.Array]],
  params: tree.PyTree,
  batches: Iterable[Any],
  which: tree.Which = None,
  *,
  axis: int = -2,
) -> tree.PyTree:
  """Returns |w_ij| ||x_i||_2, weights times the norms of their inputs.

  Weights are meant to compete within one output, ``masks`` per column.

  Args:
    capture: (params, batch) -> inputs of each scored leaf by its path,
      float[..., channels], such as Linen's ``capture_intermediates`` gives.
    params: a pytree of arrays.
    batches: any iterable of batches of one shape; read once.
    which: the leaves to score.
    axis: the input axis of the leaves; -2 for Flax.

  Raises:
    ValueError: if there is no batch, if the inputs of a leaf are missing or
      do not fit, or as the module says.

  References:
    Sun et al. (2024), arXiv:2306.11695, Eq. 1.

  Examples:
    >>> w = {'kernel': jnp.array([[1.0], [-2.0]])}
    >>> print(wanda(lambda p, x: {'kernel': x}, w, [jnp.array([[3.0, 0.5]])]))
    {'kernel': Array([[3.],
           [1.]], dtype=float32)}
  """
  chosen = tree.prunable(params, which)
  named = tree.leaves(chosen)

  def energy(params, chosen, batch):
    inputs = capture(params, batch)
    for path, w in named.items():
      if path not in inputs or inputs[path].shape[-1] != w.shape[axis]:
        got = inputs[path].shape if path in inputs else 'none'
        raise ValueError(
          f'Wanda needs inputs of {path!r} with {w.shape[axis]} channels last, '
          f'got {got}. Choose leaves with `which`.'
        )
    squares = lambda x: jnp.square(x.astype(jnp.float32))
    flat = lambda x: squares(x).reshape(-1, x.shape[-1])
    return {path: jnp.sum(flat(inputs[path]), 0) for path in named}

  sums, _ = averages.total(energy, params, chosen, batches)

  def score(path, w):
    shape = [1] * w.ndim
    shape[axis] = w.shape[axis]
    norms = jnp.sqrt(sums[path]).reshape(shape)
    pair = *floats.split(jnp.abs(w)), *floats.split(norms)
    return floats.join(floats.times(*pair))

  return tree.map_with_path(score, chosen)


# What the scores share.


def _gradient(loss: Loss) -> Callable[[Any, Any, Any], tree.PyTree]:
  """Returns ``(params, chosen, batch) -> dL/dchosen``."""

  def gradient(params, chosen, batch):
    put = lambda some: tree.map_pruned(lambda _, w: w, params, some)
    return jax.grad(lambda some: loss(put(some), batch))(chosen)

  return gradient


def _product(gradient, params, chosen, batch):
  """Returns the function v -> Hv."""
  of = lambda some: gradient(params, some, batch)
  return lambda v: jax.jvp(of, (chosen,), (v,))[1]


def _diagonal(product, chosen):
  """Returns the diagonal of a symmetric operator, one product per entry."""
  leaves, treedef = jax.tree.flatten(chosen)
  zeros = [jnp.zeros_like(w) for w in leaves]

  def entry(i, at):
    one = zeros[i].ravel().at[at].set(1).reshape(zeros[i].shape)
    v = treedef.unflatten([*zeros[:i], one, *zeros[i + 1 :]])
    return jax.tree.leaves(product(v))[i].ravel()[at]

  diagonals = [
    lax.map(functools.partial(entry, i), jnp.arange(w.size), batch_size=32)
    for i, w in enumerate(leaves)
  ]
  shaped = [d.reshape(w.shape) for d, w in zip(diagonals, leaves, strict=True)]
  return treedef.unflatten(shaped)
