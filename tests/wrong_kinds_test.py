"""Every public function with wrong kinds of argument: it works, or says why.

The law: whatever comes, a function works or raises one line of its own, a
ValueError or TypeError from a ``raise`` of this package, that names what was
wrong. The arguments are taken from a table by their names and annotations, so
that a new function is held to the law before anyone thinks of it.
"""

import importlib
import inspect
import itertools
import re
import traceback
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import io, plans, scores
from jaxprune.checks import kinds

ROOMS = """
  cost data data.augment distributions gates io io.checkpoint io.pretrained
  masks numerics.select plans plans.recovery report schedules scores
  scores.lookahead search.estimator search.evolution search.joint
  search.stagewise soft soft.channels soft.reparam soft.training structure
  transforms transforms.dynamic transforms.preview transforms.zeros tree
""".split()

# Any value is right for these, or any that is like the values of the caller.
FREE = {
  'tree.leaves',
  'tree.size',
  'tree.compact',
  'tree.is_prunable',
  'tree.why_dense',
  'structure.elementwise',  # A rule: the tracer calls it for every operation.
}


def functions():
  """Returns every public function of the package by its name."""
  table = {}
  for room in ROOMS:
    module = importlib.import_module(f'jaxprune.{room}')
    for name, fn in vars(module).items():
      plain = inspect.unwrap(fn) if callable(fn) else fn
      is_own = getattr(plain, '__module__', '').startswith(module.__name__)
      if inspect.isfunction(plain) and is_own and not name.startswith('_'):
        table[f'{room}.{name}'] = fn
  return {name: fn for name, fn in table.items() if name not in FREE}


FUNCTIONS = functions()


def network(p, x):
  return jax.nn.relu(x @ p['a']) @ p['b']


def loss(p, batch):
  return jnp.mean(network(p, batch) ** 2)


PARAMS = {
  'a': jnp.arange(32.0).reshape(4, 8) / 9 + 1,
  'b': jnp.arange(24.0).reshape(8, 3) / 9 - 1,
}
X = jnp.ones((2, 4))
WRONG_SHAPES = {'a': jnp.ones((4, 9)), 'b': jnp.ones((9, 3))}


class Module(eqx.Module):
  """A module whole: arrays beside a function and a static field."""

  weight: jax.Array
  activation: object
  width: int = eqx.field(static=True)


MODULE = Module(jnp.ones((4, 4)), jax.nn.relu, 4)
WRONG = {
  'a number': 0.5,
  'a string': 'magnitude',
  'None': None,
  'a module': jp,
  'an empty dict': {},
  'a list': [1, 2],
  'an Equinox module': MODULE,
  'a function': lambda *args, **options: None,
  'wrong shapes': WRONG_SHAPES,
  'part of a tree': {'a': PARAMS['a']},
}


def right():
  """Returns arguments that are right, by name."""
  graph = jp.trace(network, PARAMS, X)
  plan = plans.from_widths(graph, {'a': 4})
  space = jp.search.joint.space(graph, X)
  low, high = jp.search.joint.unit_range(space)
  masks = jax.tree.map(lambda w: w > 1, PARAMS)
  channels = jp.soft.channels.kernel_channels(PARAMS)
  return {
    'graph': graph,
    'small_graph': graph,
    'plan': plan,
    'first': plan,
    'second': plan,
    'full': space,
    'space': space,
    'vector': high,
    'unit': low,
    'cost': jp.search.joint.coster(space),
    'bound': jp.budget(macs=0.5),
    'target': 0.5,
    'limit': 100.0,
    'params': PARAMS,
    'tree': PARAMS,
    'values': PARAMS,
    'some': PARAMS,
    'like': PARAMS,
    'variables': PARAMS,
    'mean': PARAMS,
    'updates': PARAMS,
    'grads': PARAMS,
    'scores': scores.magnitude(PARAMS),
    'logits': PARAMS,
    'masks': masks,
    'packed': jp.masks.pack(masks),
    'keep': {'a': 3, 'b': 3},
    'wiring': jp.scores.lookahead.chain(PARAMS, ['a', 'b']),
    'state': jp.soft.pdp_init(PARAMS, 0.5),
    'channels': channels,
    'x': X,
    'h': X,
    'inputs': X,
    'images': jnp.ones((2, 4, 4, 3)),
    'image': np.ones((4, 4, 3), np.uint8),
    'key': jax.random.key(0),
    'rng': np.random.default_rng(0),
    'loss': loss,
    'fn': network,
    'layer': jnp.abs,
    'names': lambda layers: {},
    'apply_fn': network,
    'capture': lambda p, x: {'a': x, 'b': x @ p['a']},
    'batches': [X],
    'score': scores.magnitude,
    'inner': optax.sgd(0.1),
    'sparsity': 0.5,
    'distribution': jp.distributions.uniform,
    'shapes': {'a': (4, 8), 'b': (8, 3)},
    'units': {'a': 32, 'b': 24},
    'sizes': {'a': 32, 'b': 24},
    'weights': {'a': 1.0, 'b': 1.0},
    'levels': [0.0, 0.5],
    'widths': {'a': 4},
    'kept': {'a': [0, 1]},
    'dropped': (),
    'resolution': None,
    'paths': ['a', 'b'],
    'path': 'file',
    'name': 'digits',
    'rules': {'a': 1},
    'n': 2,
    'm': 4,
    'begin': 0,
    'end': 9,
    'at': ['a'],
    'fractions': [0.5, 1.0],
  }


def fault(call):
  """Returns how a call breaks the law; nothing if it holds."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    try:
      call()
    except OSError as error:  # A path to nothing, which Python names itself.
      return '' if error.filename else repr(error)
    except Exception as error:
      frames = traceback.extract_tb(error.__traceback__)
      if any(f.filename == __file__ for f in frames[2:]):
        return ''  # A function of the caller met what it cannot take.
      is_ours = re.search(r'/jaxprune/[\w/]+\.py$', frames[-1].filename)
      is_raised = 'raise' in (frames[-1].line or '')
      is_kind = isinstance(error, ValueError | TypeError)
      if not (is_ours and is_raised and is_kind and '\n' not in str(error)):
        return f'{frames[-1].filename}:{frames[-1].lineno}: {error!r:.200}'
  return ''


def required(fn):
  """Returns the parameters that a function must be given."""
  return [
    p
    for p in inspect.signature(fn).parameters.values()
    if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
  ]


def called(fn, arguments):
  """Returns a call with the arguments that a function must have."""
  kinds_of = {p.name: p.kind for p in required(fn)}
  only = inspect.Parameter.KEYWORD_ONLY
  args = [x for n, x in arguments.items() if kinds_of[n] is not only]
  options = {n: x for n, x in arguments.items() if kinds_of[n] is only}
  if 'args' in inspect.signature(fn).parameters:
    args += [X] if 'params' in arguments else [PARAMS, X]
  return lambda: fn(*args, **options)


def test_every_argument_of_a_wrong_kind(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  faults = {}
  for (name, fn), (kind, value) in itertools.product(
    FUNCTIONS.items(), WRONG.items()
  ):
    why = fault(called(fn, {p.name: value for p in required(fn)}))
    if why:
      faults[f'{name} of {kind}'] = why
  assert not faults, '\n'.join(f'{k}: {v}' for k, v in faults.items())


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(FUNCTIONS))
def test_an_argument_of_a_wrong_kind_or_swapped(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  fn, table, faults = FUNCTIONS[name], right(), {}
  base = {p.name: table.get(p.name, 0.5) for p in required(fn)}
  for argument, (kind, value) in itertools.product(base, WRONG.items()):
    if callable(value) and callable(base[argument]):
      continue
    why = fault(called(fn, {**base, argument: value}))
    if why:
      faults[f'{argument} = {kind}'] = why
  for a, b in itertools.combinations(base, 2):
    why = fault(called(fn, {**base, a: base[b], b: base[a]}))
    if why:
      faults[f'{a} and {b} swapped'] = why
  assert not faults, '\n'.join(f'{k}: {v}' for k, v in faults.items())


# The first that were met in use.

GRAPH = jp.trace(network, PARAMS, X)
PLAN = plans.from_widths(GRAPH, {'a': 4})
MAGNITUDE = scores.magnitude


@pytest.mark.parametrize(
  ('call', 'line'),
  [
    (lambda: jp.plan(GRAPH, {}, 0.5), r'`bound` .* Budget, got 0.5.*budget\('),
    (lambda: jp.shrink(PLAN, GRAPH, PARAMS), '`graph` .* got a Plan.* swapped'),
    (lambda: jp.shrink(PLAN, GRAPH), '`graph` .* got a Plan.* swapped'),
    (lambda: jp.specialise(PLAN, GRAPH), '`graph` .* got a Plan.* swapped'),
    (lambda: jp.check(PLAN, GRAPH, PARAMS), '`graph` .* got a Plan.* swapped'),
    (lambda: jp.cost.macs(PLAN), '`graph` must be a Graph, got a Plan.*trace'),
    (lambda: plans.diff(PLAN, PLAN, GRAPH), '`graph` .* got a Plan.* swapped'),
    (lambda: jp.sparsify('magnitude', 0.9), r'Give .* `scores.magnitude`'),
    (
      lambda: jp.sparsify(MAGNITUDE, 0.9, distribution='erk'),
      "`distribution` .*got 'erk'.* `distributions.erk`",
    ),
    (
      lambda: jp.sparsify(MAGNITUDE, granularity='2:4'),
      r"`granularity` .*got '2:4'.* `masks.groups\(2, 4\)`",
    ),
    (
      lambda: jp.sparsify(scores.snip, 0.9),
      r'snip\(loss, params, b.*A score',
    ),
    (lambda: jp.sparsify(scores.taylor, 0.9), 'taylor.*scores=scores'),
    (lambda: jp.sparsify(scores.grasp, 0.9), 'grasp.*scores=scores'),
    (lambda: jp.sparsify(0.9), '`score` must be a function .*got 0.9'),
    (
      lambda: io.save_safetensors('file', PARAMS, PLAN),
      r'`metadata` .* got a Plan.*plans.to_json\(plan\)',
    ),
    (lambda: MAGNITUDE(MODULE), r'`params.activation` .*function.*partition'),
    (lambda: jp.trace(lambda m, x: x, MODULE, X), '`params.activation`.*eqx'),
    (lambda: jp.masks.top({}, 0.5), 'scores to rank.*got none.*empty pytree'),
    (
      lambda: jp.masks.top({'a': jnp.zeros((0, 3))}, 0.5),
      r'scores to rank.*got none in: a \(0, 3\)',
    ),
    (
      lambda: jp.masks.top(jnp.array([jnp.nan]), 0.5),
      'NaN or infinity in: the array',
    ),
    (
      lambda: jp.masks.apply({'a': jnp.ones((4, 8), bool)}, PARAMS),
      'Masks must have the leaves of what they go with; not there: b',
    ),
  ],
)
def test_a_wrong_kind_is_named_with_its_remedy(call, line):
  with pytest.raises((ValueError, TypeError), match=line) as caught:
    call()
  assert '\n' not in str(caught.value)


def test_a_graph_without_groups_says_what_holds_them():
  def step(p, x, stats):
    return network(p, x), stats['mean'][None] + x @ p['a']

  graph = jp.trace(step, PARAMS, X, {'mean': jnp.ones(8)})
  line = r'a:1 \(it is an .*args/1/mean \(8,\) .* outputs 0, 1.*also='
  with pytest.raises(ValueError, match=line):
    jp.plan(graph, {}, jp.budget(macs=0.5))
  with pytest.raises(ValueError, match=line):
    plans.from_widths(graph, {'a': 4})


def test_a_plan_of_the_evaluation_on_a_training_step_names_also():
  def train(p, x):
    grads = jax.grad(lambda p: jnp.sum(network(p, x)))(p)
    return jax.tree.map(jnp.subtract, p, grads)

  step = jp.trace(train, PARAMS, X)
  with pytest.raises(ValueError, match=r'The plan is of graph .*also=\[\('):
    jp.specialise(step, PLAN)


@pytest.mark.parametrize(
  ('made', 'used', 'line'),
  [
    ({'sparsity': {'a': 0.5}}, {'sparsity': 0.5}, 'of other settings.*rules a'),
    ({'sparsity': 0.5}, {'sparsity': {'a': 0.5}}, 'of other settings.*one'),
    ({'packed': True}, {}, r'of another type: a \(uint8\)'),
    ({}, {'packed': True}, 'Packed masks are uint8'),
  ],
)
def test_a_state_of_other_settings_is_refused(made, used, line):
  link = lambda **options: jp.sparsify(
    MAGNITUDE, **{'sparsity': 0.5, **options}
  )
  params = {'a': PARAMS['a']}
  state = link(**made).init(params)
  with pytest.raises((ValueError, TypeError), match=line):
    link(**used).update(params, state, params)


def test_a_state_of_other_params_is_refused():
  for tx in (jp.sparsify(MAGNITUDE, 0.5), jp.keep_sparse()):
    for other in (WRONG_SHAPES, {'a': PARAMS['a']}):
      state = tx.init(other)
      with pytest.raises(ValueError, match=r'[Mm]ask.* must have'):
        tx.update(PARAMS, state, PARAMS)
  state = jp.soft.harden(PARAMS, jp.soft.pdp_init(PARAMS, 0.5))
  with pytest.raises(ValueError, match=r'Masks must have the shape of .a. '):
    jp.soft.pdp(WRONG_SHAPES, state)


def test_tracers_and_arrays_of_any_library_pass():
  @kinds.checked
  def half(x: float, n: int = 1, w: jax.Array | None = None) -> float:
    return x / 2

  assert half(np.float32(3)) == half(jnp.float32(3), np.int8(1)) == 1.5
  assert jax.jit(half)(3.0, 2, np.ones(2)) == 1.5
  assert jax.vmap(half)(jnp.ones(3)).shape == (3,)
  assert jax.eval_shape(half, jnp.float32(3)).shape == ()
  assert inspect.signature(half).parameters['n'].annotation is int
