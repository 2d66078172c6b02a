"""PDP over channels and filter pruning, as methods of the same loop.

All meet one budget of multiply-adds, by the same solver, and end in a plan: the
masks are those of whole groups, and what they close is removed for real.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.pdp import contenders
from experiments.pdp.phases import Method, Outcome
from jaxprune import masks, plans, structure, tree
from jaxprune.soft import channels as soft_channels


def readers(graph: structure.Graph) -> soft_channels.Channels:
  """Returns groups whose masks act on the rows that read them."""
  return soft_channels.Channels(
    reduce=lambda params: _norms(graph, params),
    scale=lambda params, units: structure.scale(graph, params, units),
  )


def writers(graph: structure.Graph) -> soft_channels.Channels:
  """Returns groups whose masks act on the kernels that make them.

  The published place, over whole groups: every kernel of which the group is
  the output axis.
  """
  places = {
    path: name
    for name, group in graph.groups.items()
    for path, axis, _, _ in group.members
    if path.endswith('kernel') and axis == len(graph.leaves[path].shape) - 1
  }

  def scale(params, units):
    def one(path, w):
      name = places.get(f'params/{path}')
      if name not in units:
        return w
      return w * units[name].reshape((1,) * (w.ndim - 1) + (-1,))

    return tree.map_with_path(one, params)

  return readers(graph)._replace(scale=scale)


def pdp(
  rates: Sequence[float],
  graph: structure.Graph,
  channels: soft_channels.Channels,
) -> Method:
  """PDP over groups; a plan within the budget gives each group its count."""

  def begin(params, extra, hyper, sparsity):
    del extra
    plan = jp.plan(graph, channels.reduce(params), jp.budget(macs=sparsity))
    sizes = plans.widths(graph, plan)
    pruned = {name: size - kept for name, (size, kept) in sizes.items()}
    return soft_channels.init(
      params, channels, pruned=pruned, tau=0.0, c=hyper['c']
    )

  def view(params, extra, control, hyper, progress):
    del extra
    state = contenders.soft_state(control, hyper, progress)
    return soft_channels.pdp(params, state, channels)

  def harden(params, extra, control, hyper, sparsity):
    del extra, hyper, sparsity
    hard = soft_channels.harden(params, control, channels)
    assert hard.masks is not None
    return _cut(graph, plans.from_masks(graph, hard.masks), params)

  grid = contenders.grid(rates, c=(0.25, 0.1), end=(0.6,))
  return Method(grid, begin=begin, view=view, harden=harden)


def filters(
  rates: Sequence[float], graph: structure.Graph, norm: Literal['l1', 'l2']
) -> Method:
  """One cut of the groups of smallest norm, then training goes on."""

  def begin(params, *_):
    return _cut(graph, plans.from_kept(graph, {}), params)[1]

  def refresh(params, extra, control, hyper, sparsity, progress):
    del extra
    if progress < hyper['cut']:
      return params, control
    found = _norms(graph, params, norm)
    return _cut(graph, jp.plan(graph, found, jp.budget(macs=sparsity)), params)

  def harden(params, extra, control, hyper, sparsity):
    del extra, hyper, sparsity
    return params, control

  def view(params, extra, control, *_):
    del extra
    return masks.apply(control, params)

  return Method(
    contenders.grid(rates, cut=(0.25, 0.75)),
    begin=begin,
    refresh=refresh,
    view=view,
    harden=harden,
  )


def report(
  graph: structure.Graph, inputs: jax.Array
) -> Callable[[Outcome], Mapping[str, float]]:
  """Returns what to write down of a run: its cost, and that it shrinks.

  Args:
    graph: the graph of (variables, inputs) -> logits.
    inputs: on which the small network is checked against the masked one.
  """

  def figures(outcome):
    lane = outcome.lane
    if not outcome.zeros:
      return {'macs': 1.0, 'error': 0.0}
    floats = lambda mask: mask.astype(jnp.float32)
    units = graph.reduce(jax.tree.map(floats, outcome.masks), norm='max')
    kept = {name: np.asarray(x) > 0 for name, x in units.items()}
    plan = plans.from_masks(graph, kept)
    variables = {'params': lane.params, **lane.stats}
    proof = jp.check(graph, plan, variables, inputs)
    share = jp.cost.macs(graph, plan) / jp.cost.macs(graph)
    return {'macs': share, 'error': proof.values}

  return figures


def _norms(graph: structure.Graph, params: Any, norm: Any = 'l2') -> Any:
  """Returns the norm of each unit over the kernels that it owns."""
  return graph.reduce(tree.prunable(params), norm=norm)


def _cut(
  graph: structure.Graph, plan: plans.Plan, params: Any
) -> tuple[Any, Any]:
  """Returns the params without what a plan removes, and masks of every leaf."""
  found = tree.leaves(plans.masks(graph, plan, params))
  everything = lambda path, w: jnp.asarray(
    found.get(path, np.ones(w.shape, bool))
  )
  full = tree.map_with_path(everything, params)
  return masks.apply(full, params), full
