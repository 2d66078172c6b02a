"""The functions that follow from a plan: smaller, masked, or any of many."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.plans.plan import (
  Plan,
  Resized,
  check,
  check_cuts,
  group,
  kept_indices,
  vanished,
)
from jaxprune.structure.graph import Graph, leaves_like, runner
from jaxprune.structure.program.run import Switched
from jaxprune.structure.queries import stages


@kinds.checked
def specialise(graph: Graph, plan: Plan) -> Callable[..., Any]:
  """Returns the smaller function: the traced one at the sizes that are left.

  Dropped blocks are no part of it: their operations are gone.

  Args:
    graph: the graph of ``fn(params, *args)``; ``graph.also`` holds those of
      other functions of the params, such as a training step.
    plan: a plan of it.

  Returns:
    ``small(params, *args)`` of shrunk params; a pure function for ``jit``,
    ``grad``, ``vmap``, ``scan``, ``jax.export``. Arguments like the params
    (the state of an optimizer) are shrunk too. Other shapes of args (another
    batch, a symbolic one) are traced again, once each. Where an output hands
    back a leaf that goes with a block there is None.

  Raises:
    ValueError: if the plan is of another graph; when called, if params have
      not the shapes that :func:`shrink` gives, if the first argument has not
      the plan's resolution, or if at the shapes of args the function has other
      groups.
  """
  check(graph, plan)
  return functools.partial(_call, _resized(graph, plan), plan, False)


@kinds.checked
def masked(graph: Graph, plan: Plan) -> Callable[..., Any]:
  """Returns the function at its full size with the removed units absent.

  Every intermediate array is zero where a removed unit would be, and every
  reduction passes over it: what :func:`specialise` must compute, at the full
  shapes; of a graph traced with reductions='rescale', with the divisors and
  scales of what is left. The arguments are as there, params of the full shapes.
  """
  check(graph, plan)
  return functools.partial(_call, _resized(graph, plan), plan, True)


def _resized(graph: Graph, plan: Plan) -> Graph:
  """The graph of what a plan makes smaller."""
  if not plan.resized:
    return graph
  return at(graph, plan.resolution, plan.resized)


@kinds.checked
def at(
  graph: Graph, resolution: tuple[int, ...] | None, resized: Resized = ()
) -> Graph:
  """Returns the graph of the same function at another resolution.

  Args:
    graph: the graph.
    resolution: sides of the first argument after its batch: (rows, columns) of
      images; None for those of the trace.
    resized: where it changes on the way, as :class:`Plan` has it.

  Raises:
    ValueError: if the first argument has no such axes, a cut is no path of a
      leaf, if the function cannot run there with the same params, or if it
      cannot be cut where it is to be resized
      (:func:`jaxprune.structure.queries.stages.resized`).

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 2))}
    >>> net = lambda p, x: jnp.mean(x @ p['a'], (1, 2)) @ p['b']
    >>> graph = trace(net, params, jnp.ones((1, 32, 32, 3)))
    >>> at(graph, (24, 24)).args[0].shape
    (1, 24, 24, 3)
  """
  if resolution is None and not resized:
    return graph
  check_cuts(graph, resized)
  first: Any = next(iter(graph.args), None)
  shape: Any = tuple(getattr(first, 'shape', ()))
  sides = shape[1:3] if resolution is None else resolution
  if len(shape) <= len(sides):
    raise ValueError(
      f'The first argument must have a batch and {len(sides)} axes of the '
      f'resolution {sides}, got shape {shape}.'
    )
  there = (shape[0], *sides, *shape[1 + len(sides) :])
  spec = jax.ShapeDtypeStruct(there, first.dtype)
  retrace: Callable[..., Graph] = graph.retrace
  if resized:
    cuts, after = zip(*resized, strict=True)
    fn = stages.resized(graph, cuts, [sides, *after])
    retrace = functools.partial(graph.refit, fn)
  try:
    found = retrace(spec, *graph.args[1:])
  except Exception as error:
    places = ''.join(f', {there} from {cut!r}' for cut, there in resized)
    raise ValueError(
      f'The function does not run at resolution {sides}{places}: '
      f'{str(error).splitlines()[0]} If the shape of a param depends on it, '
      f'keep the resolution of the trace.'
    ) from error
  _check_groups(graph, found)
  return found


@kinds.checked
def supernet(graph: Graph) -> Callable[..., Any]:
  """Returns the function under masks and switches that are arguments.

  One compile serves every choice of units and blocks: for the choice of a plan
  it computes what :func:`masked` does. Masks act on what flows through the
  network, never on weights, so that under ``vmap`` over choices the weights
  stay one, and convolutions stay fast.

  Args:
    graph: the graph of ``fn(params, *args)``.

  Returns:
    ``call(params, units, blocks, *args)``: ``units`` maps groups to bool[size],
    ``blocks`` names of blocks to bool[], both traced or not; what is absent is
    whole, and open. A leaf that the function hands back (the statistics of
    norms) stays as it was where a unit or a block is closed.

  Raises:
    ValueError: if an argument of the function is like a param (the state of an
      optimizer: make a step of the supernet instead); when called, if a group
      or block is unknown, a mask has another shape, or the params or arguments
      are not those of the graph.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 3)), 'b': jnp.ones((3, 1))}
    >>> mlp = lambda p, x: x + x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> call = jax.jit(supernet(graph))
    >>> units = {'a': jnp.array([True, False, True])}
    >>> call(params, units, {}, jnp.ones((1, 1))).item()
    3.0
    >>> call(params, {}, {'+a': False}, jnp.ones((1, 1))).item()
    1.0
  """
  stateful = [name for name in graph.args_like if name is not None]
  if stateful:
    raise ValueError(
      f'A supernet takes no arguments like the params, got one like '
      f'{stateful[0]!r}: trace the network alone and make a training step of '
      f'its supernet.'
    )

  def call(
    params: tree.PyTree,
    units: Mapping[str, Any],
    blocks: Mapping[str, Any],
    *args: Any,
  ) -> Any:
    traced = graph.retrace(*args)
    _check_groups(graph, traced)
    for name, mask in units.items():
      _check_switch('mask of group', name, mask, (group(traced, name).size,))
    for name, switch in blocks.items():
      if name not in traced.blocks:
        raise ValueError(
          f'There is no block {name!r}; the blocks are: '
          f'{", ".join(traced.blocks) or "none"}.'
        )
      _check_switch('switch of block', name, switch, ())
    run = Switched(
      {traced.atoms[name]: jnp.asarray(mask) for name, mask in units.items()},
      {
        traced.blocks[name].result: (traced.blocks[name].shortcut, switch)
        for name, switch in blocks.items()
      },
    )
    leaves = leaves_like(traced, params)
    _check_shapes(leaves, {p: leaf.shape for p, leaf in traced.leaves.items()})
    inputs = [leaves[path] for path in traced.leaves]
    outs = run(traced.program, [*inputs, *jax.tree.leaves(args)])
    outs = [
      out
      if path is None
      else _frozen(traced, run, blocks, path, out, leaves[path])
      for out, path in zip(outs, traced.outputs_like, strict=True)
    ]
    return jax.tree.unflatten(traced.out_tree, outs)

  return call


def _call(
  graph: Graph, plan: Plan, is_masked: bool, params: tree.PyTree, *args: Any
) -> Any:
  _check_resolution(plan, args)
  traced = graph.retrace(*args)
  _check_groups(graph, traced)
  kept = kept_indices(traced, plan)
  run = runner(traced, kept, is_masked, plan.dropped)
  gone = set() if is_masked else vanished(traced, plan.dropped)
  leaves = leaves_like(traced, params, gone)
  given = {path: leaves.get(path) for path in traced.leaves}
  given |= {f'args/{path}': x for path, x in tree.leaves(args).items()}
  inputs = list(zip(given.values(), traced.program.inputs, strict=True))
  shape_of = lambda value: tuple(
    value.shape if is_masked else (run.size(axis) for axis in value.axes)
  )
  wanted = {
    path: shape_of(value)
    for path, (_, value) in zip(given, inputs, strict=True)
    if path not in gone
  }
  _check_shapes(given, wanted)
  if is_masked:
    inputs = [(run.take(x, value.axes), value) for x, value in inputs]
  outs = run(traced.program, [x for x, _ in inputs])
  return jax.tree.unflatten(traced.out_tree, outs)


def _frozen(
  graph: Graph,
  run: Switched,
  blocks: Mapping[str, Any],
  path: str,
  new: jax.Array,
  old: jax.Array,
) -> jax.Array:
  """A leaf that is handed back: as it was where a unit or block is closed."""
  axes = dict(enumerate(graph.leaves[path].axes))
  new = run.fill(new, axes, old)
  for name, switch in blocks.items():
    if path in graph.blocks[name].leaves:
      new = jnp.where(switch, new, old)
  return new


def _check_groups(graph: Graph, traced: Graph) -> None:
  if traced.fingerprint != graph.fingerprint:
    shapes = [x.shape for x in jax.tree.leaves(traced.args)]
    raise ValueError(
      f'At arguments of shapes {shapes} the function has other groups than '
      f'where it was traced; trace it there and plan again.'
    )


def _check_resolution(plan: Plan, args: tuple[Any, ...]) -> None:
  if plan.resolution is None:
    return
  shape = np.shape(args[0]) if args else ()
  if shape[1 : 1 + len(plan.resolution)] != plan.resolution:
    raise ValueError(
      f'The plan is for a first argument of sides {plan.resolution} after its '
      f'batch, got shape {shape}: resize it, or change the plan.'
    )


def _check_shapes(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  wrong = [
    f'{path!r} must have shape {shape}, got {np.shape(given[path])}'
    for path, shape in wanted.items()
    if np.shape(given[path]) != shape
  ]
  if wrong:
    raise ValueError(
      f'{"; ".join(wrong)}. Shrink the params with the same plan.'
    )


def _check_switch(
  what: str, name: str, value: Any, shape: tuple[int, ...]
) -> None:
  if np.shape(value) != shape or jnp.result_type(value) != np.bool_:
    raise ValueError(
      f'The {what} {name!r} must be bool of shape {shape}, got '
      f'{jnp.result_type(value)} of shape {np.shape(value)}.'
    )
