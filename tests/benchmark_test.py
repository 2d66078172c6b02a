"""The rows of the benchmark: one function in two forms, networks to cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow

from experiments.benchmark import analysis, depthwise, shrinking, soft_steps
from jaxprune import plans, structure
from jaxprune.plans.proof import check

SIZES = analysis.Sizes(
  vocabulary=11, layers=1, hidden=8, pairs=2, queries=3, head=4, inner=6
)
TOKENS = jnp.array([[1, 9, 3, 3, 7], [2, 0, 10, 4, 5]])


@pytest.fixture
def promotion():
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.slow
@pytest.mark.usefixtures('promotion')
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


@pytest.mark.usefixtures('promotion')
def test_a_decoder_sees_only_what_came_before():
  params = jax.tree.map(
    lambda spec: jnp.sin(jnp.arange(spec.size)).reshape(spec.shape),
    analysis.llama_params(SIZES),
  )
  call = jax.jit(lambda tokens: analysis.llama(params, tokens, SIZES))
  one, other = call(TOKENS), call(TOKENS.at[:, 3].set(6))
  moved = jnp.any(abs(one - other) > 1e-3, (0, 2))
  assert moved.tolist() == [False, False, False, True, True]


@pytest.mark.usefixtures('promotion')
@pytest.mark.parametrize('row', analysis.ROWS)
def test_the_rows_that_trace_are_rows_of_the_benchmark(row):
  ours, other = shrinking.calls(row)
  assert other is None
  assert len(ours().groups) > 40


@pytest.mark.parametrize('backward', [False, True])
def test_both_forms_of_depthwise_maps_are_one_function(backward):
  shifted, grouped, args = depthwise.maps(
    ((6, 3, 1), (8, 2, 2)), 2, backward=backward
  )
  a, b = (jax.tree.leaves(jax.jit(fn)(*args)) for fn in (shifted, grouped))
  assert len(a) == (4 if backward else 2)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  uses = lambda fn: 'conv_general_dilated' in str(jax.make_jaxpr(fn)(*args))
  assert uses(grouped)
  assert not uses(shifted)


@pytest.mark.parametrize(
  'row', [r if r == 'pdp_mlp' else slow(r) for r in soft_steps.ROWS]
)
def test_a_step_with_pdp_is_a_step(row):
  def run():
    ours, dense, args = soft_steps.pair(row, 0.8)
    return ours(*args), dense(*args), args[:3]

  # On shapes alone: the whole networks are there, and nothing is computed.
  ours, dense, (params, momentum, stats) = jax.eval_shape(run)
  for found in (ours, dense):
    assert found == (params, momentum, stats)
