"""How much masks, plans and the small network cost, against other ways.

  python -m experiments.benchmark
  python -m experiments.benchmark --rows=global,erk --pairs=5
  python -m experiments.benchmark --rows=read  # On a GPU.

Every row is a ratio of CPU seconds, measured in interleaved pairs in one run
with its 95 % bootstrap interval, on the 54 kernels of a ResNet-50 (25.5 M
weights). ``global``, ``uniform`` and ``erk`` draw masks from |w|, against an
``argsort`` of the same scores; ``n_by_m`` draws 2:4 masks, against a double
argsort of each group; ``step`` is a step of Adam and ``sparsify`` between two
drawings, against Adam and one fused ``where``; ``vmap`` is an ensemble that
draws at every step, against one that applies fixed masks; ``lap`` are Lookahead
scores of a VGG-16 with BatchNorm, against |w|; ``read`` is one global drawing
against 32 readings of the weights, wall time where there is an accelerator and
a figure without meaning on a CPU. Temporaries and compile times are those of
the first of the two. ``shrinking`` describes the rows of planning and
shrinking, ``soft_steps`` those of training steps with PDP, ``depthwise`` those
of depthwise convolutions.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from experiments import command, settings
from experiments.benchmark import depthwise, shrinking, soft_steps
from experiments.settings import ABOVE_0, at_least, in_range, setting
from jaxprune import distributions, masks, scores, transforms
from jaxprune.numerics import select
from jaxprune.scores import lookahead

ROWS = ('global', 'uniform', 'erk', 'n_by_m', 'step', 'vmap', 'lap', 'read')
EVERY = (*ROWS, *shrinking.ROWS, *soft_steps.ROWS, *depthwise.ROWS)


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for."""

  rows: tuple[str, ...] = setting(EVERY, 'What to measure.', choices=EVERY)
  pairs: int = setting(5, 'Interleaved pairs.', fits=at_least(1))
  seconds: float = setting(
    300.0, 'Wall time of a row after which no pair is begun.'
  )
  width: float = setting(
    1.0, 'Width of the network; 0.125 finishes in seconds.', fits=ABOVE_0
  )
  sparsity: float = setting(0.8, 'Fraction of zeros.', fits=in_range('[0, 1)'))


Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def resnet50(width: float) -> dict[str, jax.Array]:
  """Returns random kernels of the shapes of a ResNet-50, by path."""
  at = lambda n: max(4, round(n * width))
  shapes: list[tuple[int, ...]] = [(7, 7, 3, at(64))]
  channels = at(64)
  for side, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
    for block in range(blocks):
      inner, outer = at(side), at(4 * side)
      shapes += [
        (1, 1, channels, inner),
        (3, 3, inner, inner),
        (1, 1, inner, outer),
      ]
      if block == 0:
        shapes.append((1, 1, channels, outer))
      channels = outer
  shapes.append((channels, 1000))
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  return {f'{i:02d}/kernel': draw(shape) for i, shape in enumerate(shapes)}


def vgg16(width: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns random params of a VGG-16 with BatchNorm, and its variances."""
  at = lambda n: max(4, round(n * width))
  sides = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  params, stats, channels = {}, {}, 3
  for i, side in enumerate(sides):
    params[f'{i:02d}/kernel'] = draw(3, 3, channels, at(side))
    params[f'{i:02d}/scale'] = draw(at(side))
    stats[f'{i:02d}/var'] = jnp.square(draw(at(side)))
    channels = at(side)
  params[f'{len(sides)}/kernel'] = draw(channels, 10)
  return params, stats


def argsort_leaf(x: jax.Array, keep: int) -> jax.Array:
  """Returns the mask of the ``keep`` largest, by a sort."""
  order = jnp.argsort(-x.ravel())
  mask = jnp.zeros(x.size, bool).at[order[:keep]].set(True)
  return mask.reshape(x.shape)


def argsort_all(tree: Any, keep: int) -> Any:
  """Returns the masks of the ``keep`` largest of all leaves, by a sort."""
  leaves, treedef = jax.tree.flatten(tree)
  flat = argsort_leaf(jnp.concatenate([x.ravel() for x in leaves]), keep)
  ends = np.cumsum([x.size for x in leaves])[:-1]
  parts = jnp.split(flat, ends)
  shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
  return treedef.unflatten(shaped)


def argsort_groups(x: jax.Array) -> jax.Array:
  """Returns 2:4 masks along axis -2, by a double argsort."""
  groups = jnp.swapaxes(x, -2, -1)
  groups = groups.reshape(*groups.shape[:-1], -1, 4)
  rank = jnp.argsort(jnp.argsort(-groups, axis=-1), axis=-1)
  mask = (rank < 2).reshape(*x.shape[:-2], x.shape[-1], x.shape[-2])
  return jnp.swapaxes(mask, -2, -1)


def pair(row: str, params: dict[str, jax.Array], config: Config) -> Pair:
  """Returns what is measured, what it is measured against, and arguments."""
  sparsity = config.sparsity
  shapes = {path: w.shape for path, w in params.items()}
  if row == 'global':
    keep = masks.kept(jaxprune.tree.size(params), sparsity)
    return (
      lambda p: select.top_masks(scores.magnitude(p), keep),
      lambda p: argsort_all(scores.magnitude(p), keep),
      (params,),
    )
  if row in ('uniform', 'erk'):
    counts = getattr(distributions, row)(shapes, sparsity)
    return (
      lambda p: select.top_masks(scores.magnitude(p), counts),
      lambda p: jax.tree.map(argsort_leaf, scores.magnitude(p), counts),
      (params,),
    )
  if row == 'n_by_m':
    even = {k: w for k, w in params.items() if w.shape[-2] % 4 == 0}
    magnitude = lambda p: jax.tree.map(jnp.abs, p)
    return (
      lambda p: jax.tree.map(lambda x: masks.n_by_m(x, 2, 4), magnitude(p)),
      lambda p: jax.tree.map(argsort_groups, magnitude(p)),
      (even,),
    )
  if row == 'step':
    return _step(params, sparsity)
  if row == 'vmap':
    return _ensemble(params, sparsity)
  if row == 'lap':
    return _lookahead(*vgg16(config.width))
  if row == 'read':
    return _read(params, sparsity)
  if row in soft_steps.ROWS:
    return soft_steps.pair(row, sparsity)
  if row in depthwise.ROWS:
    return depthwise.pair(row)
  raise ValueError(f'No row is called {row!r}; the rows: {", ".join(ROWS)}.')


def _step(params: dict[str, jax.Array], sparsity: float) -> Pair:
  adam = optax.adam(1e-3)
  link = transforms.sparsify(scores.magnitude, sparsity)
  drawn = select.top_masks(
    scores.magnitude(params),
    distributions.uniform({k: w.shape for k, w in params.items()}, sparsity),
  )
  # The state after the one drawing: from here masks rest. Every 16th step also
  # counts what has come back; this one does not.
  state = transforms.SparsifyState(
    step=jnp.int32(1001),
    mask_sparsity=jnp.float32(sparsity),
    masks=drawn,
    revived=jnp.int32(0),
  )
  chain = optax.chain(adam, link)

  def sparse(params, grads, states):
    updates, states = chain.update(grads, states, params)
    return optax.apply_updates(params, updates), states

  def bare(params, grads, states):
    updates, inner = adam.update(grads, states[0], params)
    new = optax.apply_updates(params, updates)
    return masks.apply(states[1].masks, new), (inner, states[1])

  return sparse, bare, (params, params, (adam.init(params), state))


def _ensemble(params: dict[str, jax.Array], sparsity: float) -> Pair:
  largest = max(params, key=lambda path: params[path].size)
  many = {largest: jnp.stack([params[largest]] * 4)}
  keep = masks.kept(params[largest].size, sparsity)
  draw = lambda p: select.top_masks(scores.magnitude(p), {largest: keep})
  fixed = jax.vmap(draw)(many)
  return (
    lambda p, m: masks.apply(jax.vmap(draw)(p), p),
    lambda p, m: masks.apply(m, p),
    (many, fixed),
  )


def _lookahead(
  params: dict[str, jax.Array], stats: dict[str, jax.Array]
) -> Pair:
  kernels = [path for path in params if path.endswith('kernel')]
  names = [path.removesuffix('kernel') for path in kernels[:-1]]
  norms = {f'{n}kernel': (f'{n}scale', f'{n}var') for n in names}
  wiring = lookahead.chain(params, kernels, norms=norms)
  return (
    lambda p, s: lookahead.lookahead(p, wiring, stats=s),
    lambda p, s: scores.magnitude(p),
    (params, stats),
  )


def _read(params: dict[str, jax.Array], sparsity: float) -> Pair:
  keep = masks.kept(jaxprune.tree.size(params), sparsity)
  flat = jnp.concatenate([w.ravel() for w in params.values()])

  def read(_, flat):
    # Each reading needs the one before: none can be left out or moved.
    once = lambda _, level: jnp.mean(jnp.maximum(flat, level))
    return jax.lax.fori_loop(0, 32, once, jnp.float32(0))

  return (
    lambda p, _: select.top_masks(scores.magnitude(p), keep),
    read,
    (params, flat),
  )


def compile_(
  fn: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], float, float]:
  """Returns the compiled function, its CPU seconds to compile, temporaries."""
  start = time.process_time()
  compiled = jax.jit(fn).lower(*args).compile()
  seconds = time.process_time() - start
  memory = compiled.memory_analysis()
  return compiled, seconds, getattr(memory, 'temp_size_in_bytes', 0) / 1e6


def measure(
  row: str, params: dict[str, jax.Array], config: Config
) -> dict[str, Any]:
  """Times one row; returns its figures."""
  ours, other, args = pair(row, params, config)
  (ours, compile_s, temp), (other, other_compile_s, other_temp) = (
    compile_(fn, args) for fn in (ours, other)
  )
  clock = time.process_time
  if jax.default_backend() != 'cpu':
    clock = time.perf_counter  # The work is not the CPU's.

  def seconds(fn):
    start = clock()
    jax.block_until_ready(fn(*args))
    return clock() - start

  for fn in (ours, other):
    seconds(fn)
  begun, times = time.monotonic(), []
  for _ in range(config.pairs):
    times.append((seconds(ours), seconds(other)))
    if time.monotonic() - begun > config.seconds:
      break
  times = np.array(times)
  ratios = times[:, 0] / times[:, 1]
  draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
  low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
  return {
    'row': row,
    'weights': jaxprune.tree.size(args[0]),
    'seconds': float(np.median(times[:, 0])),
    'against': float(np.median(times[:, 1])),
    'ratio': float(np.median(ratios)),
    'interval': [float(low), float(high)],
    'pairs': len(times),
    'temporaries_mb': temp,
    'against_temporaries_mb': other_temp,
    'compile_s': compile_s,
    'against_compile_s': other_compile_s,
  }


def run(argv: Sequence[str]) -> tuple[None, str]:
  """Measures every row and prints one line of JSON for each."""
  config = settings.parse(Config, argv)
  params = resnet50(config.width)
  for row in config.rows:
    if row in shrinking.ROWS:
      figures = shrinking.measure(row, config.pairs, config.seconds)
      print(shrinking.line(figures))
      print(json.dumps(figures), flush=True)
      continue
    figures = measure(row, params, config)
    low, high = figures['interval']
    print(
      f'{row}: {figures["seconds"]:.3f} s against {figures["against"]:.3f} s, '
      f'ratio 1/{1 / figures["ratio"]:.1f} = {figures["ratio"]:.4f} '
      f'[{low:.4f}, {high:.4f}], temporaries '
      f'{figures["temporaries_mb"]:.1f} MB, compile '
      f'{figures["compile_s"]:.1f} CPU-s'
    )
    print(json.dumps(figures), flush=True)
  return None, ''


if __name__ == '__main__':
  sys.exit(command.job(run, Config, sys.argv[1:], __doc__))
