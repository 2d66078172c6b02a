"""What the benchmark analyses is a network that can be cut."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import analysis, shrinking
from jaxprune import plans, structure
from jaxprune.proof import check

SIZES = analysis.Sizes(
  vocabulary=11, layers=1, hidden=8, pairs=2, queries=3, head=4, inner=6
)
TOKENS = jnp.array([[1, 9, 3, 3, 7], [2, 0, 10, 4, 5]])


@pytest.fixture(autouse=True)
def _promote():
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.slow
def test_a_decoder_of_the_form_of_llama_is_cut_everywhere():
  specs = analysis.llama_params(SIZES)
  leaves, form = jax.tree.flatten(specs)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  draw = lambda key, spec: 0.5 * jax.random.normal(key, spec.shape)
  params = form.unflatten(map(draw, keys, leaves))
  fn = lambda params, tokens: analysis.llama(params, tokens, SIZES)
  graph = structure.trace(fn, specs, TOKENS, reductions='keep')
  sizes = sorted(group.size for group in graph.groups.values())
  # Pairs, half a head, queries, values, between, and the residual stream.
  assert sizes == [2, 2, 3, 4, 6, 8]
  plan = plans.from_kept(
    graph, {n: range(g.size // 2, g.size) for n, g in graph.groups.items()}
  )
  assert check(graph, plan, params, TOKENS, gradients=False).values < 1e-5


def test_it_sees_only_what_came_before():
  params = jax.tree.map(
    lambda spec: jnp.sin(jnp.arange(spec.size)).reshape(spec.shape),
    analysis.llama_params(SIZES),
  )
  call = jax.jit(lambda tokens: analysis.llama(params, tokens, SIZES))
  one, other = call(TOKENS), call(TOKENS.at[:, 3].set(6))
  moved = jnp.any(abs(one - other) > 1e-3, (0, 2))
  assert moved.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize('row', analysis.ROWS)
def test_the_rows_that_trace_are_rows_of_the_benchmark(row):
  ours, other = shrinking.calls(row)
  assert other is None
  assert len(ours().groups) > 40
