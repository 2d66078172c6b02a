"""The one table of primitives: alive, complete, and open to a user's own."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import jaxprune as jp
import jaxprune.io  # Its translations are in the table too.
from jaxprune import structure
from jaxprune.structure.program import typed
from jaxprune.structure.rules import primitives
from jaxprune.structure.walks import flow

# What not every supported JAX has.
OF_SOME = frozenset(
  """
  box_get box_set call closed_call core_map get_variable log2 log_extend
  log_read new_box new_log new_variable one_minus_square pbroadcast_done
  pbroadcast_dynamic pbroadcast_start polynomial psum_start reduced_vary_cast
  reduced_vary_cast_p relayout set_variable unreduced_pmax unreduced_pmin
  unreduced_psum_start unreduced_reduce_scatter_start vary_unreduced_cast
  vary_unreduced_cast_p
  """.split()
)
LISTED = textwrap.dedent("""
  import gc, json
  import equinox, flax.linen, flax.nnx, jax
  from jax.extend.core import Primitive
  made = [x.name for x in gc.get_objects() if isinstance(x, Primitive)]
  print(json.dumps(sorted(set(made))))
""")


@pytest.fixture(scope='module')
def alive():
  """The names of all primitives after importing jax, flax and equinox."""
  command = [sys.executable, '-c', LISTED]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return frozenset(json.loads(done.stdout))


def test_every_row_is_of_a_primitive_that_jax_has(alive):
  assert len(alive) > 200
  rows = {name for name in primitives.TABLE if not name.endswith('_of_mine')}
  assert sorted(rows - alive - OF_SOME) == []


def test_every_primitive_has_a_rule_or_is_refused_with_a_reason(alive):
  rows = {name: primitives.known(name) for name in alive}
  known = {n for n, row in rows.items() if row.rule is not None or row.bodies}
  refused = {name for name, row in rows.items() if row.refused}
  assert sorted(alive - known - refused) == []
  assert sorted(known & refused) == []


@pytest.fixture
def twice():
  """A primitive of a user's own: two times its operand."""
  double = Primitive('twice_of_mine')
  double.def_impl(lambda x: 2 * x)
  double.def_abstract_eval(lambda x: x)
  lowered = mlir.lower_fun(lambda x: 2 * x, multiple_results=False)
  mlir.register_lowering(double, lowered)
  ad.deflinear2(double, lambda cotangent, x: [double.bind(cotangent)])
  yield double
  primitives.TABLE.pop('twice_of_mine', None)


PARAMS = {
  'a': jax.random.normal(jax.random.key(0), (3, 8)),
  'b': jax.random.normal(jax.random.key(1), (8, 2)),
}
X = jax.random.normal(jax.random.key(2), (4, 3))


def test_a_rule_from_outside_makes_a_primitive_prunable(twice):
  net = lambda p, x: twice.bind(x @ p['a']) @ p['b']
  refused = structure.trace(net, PARAMS, X)
  assert refused.groups == {}
  remedy = "jaxprune.structure.rule('twice_of_mine')"
  assert remedy in refused.explain('a', 1)

  @structure.rule('twice_of_mine', zero='first', linear='first')
  def _(eqn):
    eqn.outputs[0].axes = list(eqn.inputs[0].axes)

  graph = structure.trace(net, PARAMS, X)
  (name,) = graph.groups
  scores = {name: np.arange(8.0)}
  plan = jp.plan(graph, scores, jp.budget(macs=0.5))
  jp.check(graph, plan, PARAMS, X)


def test_a_trait_from_outside_says_that_absent_units_are_zero(twice):
  """Of two features that neither side makes zero, the sum counts them."""
  square = lambda p, x: twice.bind(x @ p['a']) @ twice.bind(x @ p['a']).T
  structure.rule('twice_of_mine')(structure.elementwise)
  assert structure.trace(square, PARAMS, X).groups == {}
  structure.rule('twice_of_mine', zero='all')(structure.elementwise)
  assert len(structure.trace(square, PARAMS, X).groups) == 1


def test_a_check_says_cause_and_remedy_where_a_trait_is_wrong(monkeypatch):
  """With cos taken for zero at zero, features of it are offered."""
  wrong = dataclasses.replace(primitives.known('cos'), zero='all')
  monkeypatch.setitem(primitives.TABLE, 'cos', wrong)
  net = lambda p, x: jnp.cos(x @ p['a']) @ jnp.cos(p['b'])
  graph = structure.trace(net, PARAMS, X)
  plan = jp.plans.from_kept(graph, {'a': [0, 2, 3, 5]})
  with pytest.raises(jp.plans.CheckError) as error:
    jp.check(graph, plan, PARAMS, X)
  assert 'computes with what an absent unit leaves' in str(error.value)
  assert 'rules={name: Choice(protect=True)}' in str(error.value)
  whole = {'a': structure.Choice(protect=True)}
  assert structure.trace(net, PARAMS, X, rules=whole).groups == {}
  monkeypatch.undo()
  assert structure.trace(net, PARAMS, X).groups == {}


def test_control_flow_is_that_of_the_table():
  rows = primitives.where(bodies=('control', 'derivative'))
  assert sorted(typed._CONTROL) == list(rows)


def test_a_barrier_hands_each_operand_to_its_own_result():
  """Of two that pass together, one is zero and one is the input."""
  params = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 3))}

  def net(p, x):
    other, x = lax.optimization_barrier((jnp.zeros_like(x), x))
    return x + jnp.tanh(x @ p['a']) @ p['b'] + other

  graph = structure.trace(net, params, X)
  stream = flow.flow(graph.program)
  (barrier,) = [
    step
    for step in stream.steps
    if not isinstance(step, flow.Binding)
    and step.primitive.name == 'optimization_barrier'
  ]
  assert list(map(stream.is_zero, barrier.outputs)) == [True, False]


def test_a_refused_primitive_says_why_and_how_to_add_a_rule():
  net = lambda p, x: jnp.linalg.svd(x @ p['a'])[1] @ p['b'][:4]
  why = structure.trace(net, PARAMS, X).explain('a', 1)
  assert 'svd at primitives_test.py' in why
  assert 'it solves or factors whole matrices' in why
  assert "jaxprune.structure.rule('svd')" in why


def test_a_rule_refuses_a_wrong_name_or_trait():
  number: Any = 3
  with pytest.raises(TypeError, match=r"as in rule\('name'\), got \(3,\)"):
    structure.rule(number)
  with pytest.raises(ValueError, match='zero of a primitive must be one of'):
    structure.rule('twice_of_mine', zero='yes')
  assert 'twice_of_mine' not in primitives.TABLE


def test_the_largest_number_of_a_dtype_stands_for_infinity():
  assert primitives.neutral_of(-np.inf, np.float32) == -np.inf
  assert primitives.neutral_of(-np.inf, np.int8) == -128
  assert primitives.neutral_of(np.inf, np.uint8) == 255
  assert primitives.neutral_of(-np.inf, np.bool_) is False
  assert primitives.neutral_of(1, np.bool_) is True
