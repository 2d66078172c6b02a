"""The comparison of PDP with its baselines, on a problem of a moment."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments import runbook, settings
from experiments.benchmark import soft_steps
from experiments.pdp import __main__ as pdp
from experiments.pdp import channel_contenders, contenders, contests, phases
from jaxprune import data, models, tree
from jaxprune.data import text

RATES = (0.05, 0.1)


def problem(net, **options):
  """Four classes that a linear function tells apart."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((96, 4, 4, 1)).astype(np.float32)
  y = (x[:, 0, 0, 0] > 0) * 2 + (x[:, 1, 1, 0] > 0)
  part = lambda i: phases.Split(jnp.asarray(x[i]), jnp.asarray(y[i], jnp.int32))
  splits = part(slice(0, 64)), part(slice(64, 80)), part(slice(80, 96))
  sgd = lambda rate, decay: optax.chain(
    optax.add_decayed_weights(1e-4 * decay), optax.sgd(rate, momentum=0.9)
  )
  return contests.make_problem(
    'toy', net, splits, epochs=5, batch=8, tx=sgd, **options
  )


@pytest.fixture(scope='module')
def toy():
  return problem(models.MLP(hidden=(12,), num_classes=4))


QUICK = {
  'dense': contenders.dense(RATES),
  'PDP': contenders.pdp(RATES, None),
  'GMP': contenders.gradual(RATES, None),
}
SLOW = {
  'published': contenders.pdp_published(RATES, None),
  'one-shot': contenders.one_shot(RATES, None),
  'STR': contenders.soft_threshold(RATES, None),
  'CS': contenders.sigmoid_gates(RATES, None),
  'movement': contenders.movement(RATES, None),
  'PDP 1:4': contenders.pdp(RATES, None, (1, 4)),
  'SR-STE 1:4': contenders.sr_ste(RATES, None, (1, 4)),
  'ASP 1:4': contenders.n_by_m_one_shot(RATES, None, (1, 4)),
}


@pytest.mark.parametrize(
  'name', [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_a_method_ends_with_the_zeros_it_was_asked_for(toy, name):
  method = {**QUICK, **SLOW}[name]
  assert len(method.grid) == 4  # The same number of trials for all.
  out = phases.runner(toy, method)(0, method.grid[-1], 0.75, 'test')
  kernels = tree.leaves(tree.prunable(out.lane.params))
  zeros = sum(int((w == 0).sum()) for w in kernels.values())
  size = sum(w.size for w in kernels.values())
  assert zeros == (0 if name == 'dense' else round(0.75 * size))
  assert out.zeros == zeros / size
  if '1:4' in name:
    for w in kernels.values():
      groups = np.asarray(w != 0).reshape(-1, 4, w.shape[-1])
      np.testing.assert_array_equal(groups.sum(1), 1)


def test_a_run_is_a_function_of_its_seed(toy):
  method = QUICK['GMP']
  run = phases.runner(toy, method)
  one, two, other = (run(seed, method.grid[0], 0.5) for seed in (0, 0, 1))
  same = lambda a, b: all(map(np.array_equal, *map(jax.tree.leaves, (a, b))))
  assert same(one.lane.params, two.lane.params)
  assert not same(one.lane.params, other.lane.params)


def contest(problem, methods):
  return contests.Contest(problem, ('0.5',), '0.5', 2, lambda target: methods)


def test_a_contest_goes_on_where_it_was_stopped(toy, tmp_path, capsys):
  book = runbook.Book(tmp_path / 'toy.jsonl', 'experiments.pdp')
  two = contest(toy, {name: QUICK[name] for name in ('PDP', 'GMP')})
  pdp.compete(two, book, ['GMP'])
  assert len(book.read()) == 4 + 2  # Trials and seeds.
  pdp.compete(two, book, [])
  assert len(book.read()) == 2 * (4 + 2)
  of_pdp = runbook.matching(book.read(), {'method': 'PDP'})
  tried = runbook.matching(of_pdp, {'split': 'validation'})
  best = max(tried, key=lambda row: row['accuracy'])['settings']['hyper']
  final = runbook.matching(of_pdp, {'trial': None})[0]
  assert final['settings']['hyper'] == best
  capsys.readouterr()
  pdp.compete(two, book, [])
  assert not capsys.readouterr().out  # Nothing was left to run.
  table = pdp.summarise(book.read())
  assert '| PDP | rate ' in table
  assert 'CPU-minutes' in table


@pytest.mark.parametrize(
  ('flag', 'text'),
  [
    ('--methods=PDQ', '--methods must be of PDP; GMP, got PDQ.'),
    ('--targets=1.5', "--targets must be like 0.5, got '1.5'."),
    ('--targets=0.5,1:4', "--targets must be like 0.5, got '1:4'."),
    ('--seeds=0', '--seeds must be at least 1, got 0.'),
    ('--epochs=0', '--epochs must be at least 1, got 0.'),
    ('--task=mnits', "No task is called 'mnits'; there are toy."),
  ],
)
def test_a_wrong_flag_is_named_before_anything_runs(
  toy, flag, text, monkeypatch, tmp_path
):
  given = contest(toy, {name: QUICK[name] for name in ('PDP', 'GMP')})
  monkeypatch.setattr(pdp, 'TASKS', {'toy': lambda *_: given})
  with pytest.raises(settings.BadInputError, match=re.escape(text)):
    pdp.run(['--task=toy', f'--workdir={tmp_path}', flag])
  assert not any(tmp_path.iterdir())


def test_the_runs_for_a_gpu_are_ready(monkeypatch):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5_064, 32, 32, 3), np.uint8)
  labels = np.arange(5_064, dtype=np.int32) % 10
  some = data.Dataset(images, labels, tuple('0123456789'), 'cifar10', '1')
  monkeypatch.setattr(data, 'load', lambda *_: some)
  given = contests.mobilenet(None, None)
  assert (given.targets, given.tune, given.seeds) == (('0.866',), '0.866', 3)
  assert {'PDP', 'GMP', 'one-shot'} < given.methods('0.866').keys()
  problem = given.problem
  params, stats, _ = jax.eval_shape(lambda: problem.start(0))
  x = jax.ShapeDtypeStruct((8, 32, 32, 3), np.float32)
  apply = lambda p, s, x: problem.apply(p, s, x, True)
  logits, after = jax.eval_shape(apply, params, stats, x)
  assert logits.shape == (8, 10)
  assert jax.tree.structure(after) == jax.tree.structure(stats)


def test_groups_are_targets_of_groups(toy):
  given = contest(toy, {'PDP': QUICK['PDP']})._replace(targets=('2:4', '1:4'))
  narrow = lambda *argv: pdp.narrowed(given, settings.parse(pdp.Config, argv))
  assert narrow('--targets=1:4', '--seeds=3')[1:4] == (('1:4',), '0.5', 3)
  for target in ('4:4', '0.5'):
    with pytest.raises(
      settings.BadInputError, match=f'2:4,1:4, got {target!r}'
    ):
      narrow(f'--targets={target}')


def test_runs_of_another_length_are_not_mixed(
  toy, monkeypatch, tmp_path, capsys
):
  lengths = []
  given = contest(toy, {})
  monkeypatch.setattr(
    pdp, 'TASKS', {'toy': lambda _, epochs: lengths.append(epochs) or given}
  )
  monkeypatch.setattr(
    pdp,
    'compete',
    lambda _, book, __: book.add(
      {'trial': 1},
      seed=0,
      accuracy=90.0,
      counts={},
      cpu_seconds=60.0,
      details={},
    ),
  )
  for given_flags in ([], ['--epochs=7']):
    asked = [f'--workdir={tmp_path}', '--task=toy', *given_flags]
    assert pdp.main(asked) == 0
    assert '1.0 CPU-minutes' in capsys.readouterr().out
  assert lengths == [None, 7]


def test_the_sources_of_texts_are_stored_and_printed_with_the_runs(
  toy, tmp_path
):
  part = lambda texts, labels: text.TextSet(
    texts, np.int32(labels), ('python', 'numpy'), 'docs', 'python 3, numpy 2'
  )
  train = part(('red red', 'red', 'blue'), [0, 0, 1])
  facts = contests.sources(
    train, part(('red', 'blue', 'blue', 'blue'), [0, 1, 1, 1])
  )
  given = contest(toy, {'GMP': QUICK['GMP']})._replace(
    report=lambda outcome: {'sources': facts}
  )
  book = runbook.Book(tmp_path / 'toy.jsonl', 'experiments.pdp')
  pdp.compete(given, book, [])
  rows = book.read()
  assert all(row['details']['sources'] == facts for row in rows)
  table = pdp.summarise(rows)
  line = 'Sentences of python 3, numpy 2; licences: python PSF-2.0, numpy BSD-'
  assert table.count(line) == 1
  assert 'majority 25.0, bag of words 100.0' in table


@pytest.mark.slow
def test_the_scan_and_the_loop_agree(toy):
  method = QUICK['PDP']
  outs = [
    phases.runner(toy._replace(fused=fused), method)(0, method.grid[0], 0.5)
    for fused in (True, False)
  ]
  a, b = (out.lane.params for out in outs)
  close = lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-5)
  jax.tree.map(close, a, b)


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(toy):
  lane = phases.runner(toy, QUICK['dense'])(0, {'rate': 0.1}, 0.0).lane
  taught = phases.logits(toy, lane.params, lane.stats)
  assert taught.shape == (64, 4)
  start = lambda seed: (toy.start(1)[0], {}, -taught)  # The wrong way round.
  student = toy._replace(start=start, distil=1.0)
  out = phases.runner(student, QUICK['dense'])(0, {'rate': 0.1}, 0.0)
  sound = phases.runner(toy, QUICK['dense'])(0, {'rate': 0.1}, 0.0)
  assert out.accuracy < sound.accuracy


@pytest.mark.slow
def test_the_rows_of_the_benchmark_learn():
  step, dense, args = soft_steps.steps(
    models.resnet_digits(channels=(4, 4, 4), num_classes=10),
    (10, 4, 4, 1),
    0.8,
  )
  (params, _, _), (other, _, _) = (jax.jit(f)(*args) for f in (step, dense))
  first = lambda p: np.asarray(p['stem']['kernel'])
  assert np.isfinite(first(params)).all()
  assert (first(params) != first(other)).any()
  assert (first(other) != first(args[0])).any()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['readers', 'writers', 'l1', 'l2'])
def test_channels_are_removed_for_real(name):
  net = models.resnet_digits(channels=(4, 8, 8), num_classes=4)
  x = jnp.zeros((2, 4, 4, 1))
  variables = dict(jax.jit(net.init)(jax.random.key(0), x))
  graph = jp.trace(lambda v, x: net.apply(v, x), variables, x[:1])
  params = variables.pop('params')
  toy = problem(
    net,
    apply=contests.apply_with_statistics(net),
    start=lambda seed: (params, variables, None),
    fused=False,
  )
  if name in ('l1', 'l2'):
    method = channel_contenders.filters(RATES, graph, name)
  else:
    channels = getattr(channel_contenders, name)(graph)
    method = channel_contenders.pdp(RATES, graph, channels)
  out = phases.runner(toy, method)(0, method.grid[0], 0.5)
  noise = jax.random.normal(jax.random.key(1), (4, 4, 4, 1))
  figures = channel_contenders.report(graph, noise)(out)
  assert 0.4 < figures['macs'] <= 0.5
  assert figures['error'] < 1e-5
