"""What each method of pruning adds to training: plain functions, no state.

A method is a last link of the optax chain and a view of the params inside the
loss; the loop knows nothing else of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from experiments import train
from jaxprune import distributions, masks, schedules, scores, transforms, tree
from jaxprune.soft import training


class Method(NamedTuple):
  """One way to prune, on the way from the dense network."""

  link: Any  # The last link of the chain.
  view: train.View  # The params inside the loss.
  start: Callable[[Any], Any]  # Variables to begin with.


def dense() -> Method:
  """Prunes nothing."""
  return Method(
    link=optax.identity(),
    view=lambda params, _: params,
    start=lambda variables: variables,
  )


def channel(keep: Any) -> Method:
  """Fine-tunes with the channels of a plan at exactly zero.

  Args:
    keep: masks like the variables, from ``plans.masks``.
  """
  return Method(
    link=transforms.keep_sparse(keep['params']),
    view=lambda params, _: params,
    start=lambda variables: masks.apply(keep, variables),
  )


def pdp(sparsity: float, steps: int) -> Method:
  """Soft masks in the loss, then fine-tuning under the frozen hard masks.

  The ramp reaches the target after 40 % of the steps; the relative temperature
  c stays at 0.25 until 50 % and falls to 0.01 at 70 %, where the masks harden.

  Args:
    sparsity: fraction of zeros over all prunable weights.
    steps: of the whole stage.
  """
  full, cool, hard = (max(1, round(f * steps)) for f in (0.4, 0.5, 0.7))
  ramp = lambda step: jnp.minimum(1.0, (step + 1) / full)
  fall = lambda step: jnp.clip((step - cool) / max(1, hard - cool), 0.0, 1.0)
  link = training.track_pdp(
    sparsity,
    begin=0,
    end=hard,
    ramp=ramp,
    tau=0.0,
    c=lambda step: 0.25 * (0.01 / 0.25) ** fall(step),
  )
  return Method(
    link=link,
    view=training.with_pdp(lambda params: params),
    start=lambda variables: variables,
  )


def gradual(
  score: Callable[..., Any],
  distribution: distributions.Distribution,
  sparsity: float,
  steps: int,
) -> Method:
  """Zeroes the lowest scores along a cubic ramp over 60 % of the steps.

  Args:
    score: params -> scores.
    distribution: how the leaves share the zeros.
    sparsity: fraction of zeros over all prunable weights.
    steps: of the whole stage.
  """
  end = max(1, round(0.6 * steps))
  ramp = schedules.cubic(sparsity, begin=0, end=end)
  link = transforms.sparsify(
    score, ramp, distribution=distribution, every=max(1, end // 20)
  )
  return Method(
    link=link,
    view=lambda params, _: params,
    start=lambda variables: variables,
  )


def magnitude(sparsity: float, steps: int) -> Method:
  """Gradual magnitude pruning under one global threshold."""
  pooled = distributions.global_
  return gradual(scores.magnitude, pooled, sparsity, steps)


def lamp(sparsity: float, steps: int) -> Method:
  """Gradual pruning by layer-adaptive magnitude (LAMP)."""
  return gradual(scores.magnitude, distributions.lamp, sparsity, steps)


def erk(sparsity: float, steps: int) -> Method:
  """Gradual magnitude pruning with the layer densities of Erdos-Renyi."""
  return gradual(scores.magnitude, distributions.erk, sparsity, steps)


def zeros(params: Any) -> dict[str, tuple[int, int]]:
  """Returns (zeros, entries) of every weight that pruning may thin out."""
  weights = tree.leaves(tree.prunable(params))
  return {p: (int(jnp.sum(w == 0)), w.size) for p, w in weights.items()}
