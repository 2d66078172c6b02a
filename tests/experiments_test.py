import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from marks import slow

import jaxprune as jp
from experiments import (
  flags,
  methods,
  prune,
  recipes,
  sources,
  tasks,
  timing,
  train,
  workdir,
)
from jaxprune import data, io, models, plans, report
from jaxprune.data import augment, digits
from jaxprune.io import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# As a user has it: one device, and XLA's usual optimisation.
PLAIN = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}


# --- Flags -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argv', 'text'),
  [
    (['--sparsty=0.5'], "Unknown command line flag 'sparsty'"),
    (['--method=magic'], 'magic: value should be one of <both|channel|pdp'),
    (['--model=resnet1000'], 'resnet1000: value should be one of <resnet_dig'),
    (['--sparsity=1'], '--sparsity must be in [0, 1), got 1.0.'),
    (['--sparsity=-0.1'], '--sparsity must be in [0, 1), got -0.1.'),
    (['--sparsity=nan'], '--sparsity must be in [0, 1), got nan.'),
    (['--macs=0'], '--macs must be in (0, 1], got 0.0.'),
    (['--devices=99'], '--devices is 99, JAX sees 4; on CPU, XLA_FLAGS='),
    (['--devices=3'], '--batch of 64 cannot be split over --devices of 3.'),
    (['--epochs=0'], '--epochs must be at least 1, got 0.'),
    (['--epochs=two'], 'two'),
    (['--cutout=-1'], '--cutout must be at least 0, got -1.'),
    (['--side=8'], '--side cuts photos as they stream; give --stream too.'),
    (['--mixup=-0.5'], '--mixup must be at least 0, got -0.5.'),
    (['--label_smoothing=1'], '--label_smoothing must be in [0, 1), got 1.0.'),
    (['--ema=1'], '--ema must be in [0, 1), got 1.0.'),
    (['--distill=2'], '--distill must be in [0, 1], got 2.0.'),
    (['--dtype=int8'], 'int8: value should be one of <float32|bfloat16>'),
    (['--remat', '--model=mlp'], '--remat: mlp has no blocks to compute again'),
    (['--learning_rate=0'], '--learning_rate must be above 0, got 0.0.'),
    (['sparsity=0.5'], "'sparsity=0.5' is no flag; write --name=value."),
  ],
)
def test_a_wrong_flag_is_one_line_and_code_2(argv, text, capsys, tmp_path):
  folder = tmp_path / 'run'
  assert prune.main([*argv, f'--workdir={folder}']) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  assert text in err
  assert not folder.exists()


def test_flags_fill_a_configuration():
  config = flags.parse(
    ['--preset=smoke', '--epochs=7', '--dataset=mnist:3.0.1']
  )
  assert (config.epochs, config.prune_epochs) == (7, 2)  # Given ones win.
  assert config.model == 'lenet5'
  usual = flags.parse([])
  assert (usual.model, usual.sparsity, usual.macs) == (
    'resnet_digits',
    0.9,
    0.45,
  )
  assert usual.learning_rate == 0.1
  adam = flags.parse(['--optimizer=adam'])
  assert adam.learning_rate == 0.001
  with pytest.raises(dataclasses.FrozenInstanceError):
    usual.seed = 1  # type: ignore


def test_the_default_folder_is_the_flags_own():
  folder = lambda *argv: flags.parse(argv).workdir
  assert folder() == folder()
  assert folder() != folder('--seed=1')
  assert folder('--workdir=here') == 'here'


def test_help_names_every_flag(capsys):
  assert prune.main(['--help']) == 0
  out = capsys.readouterr().out
  for field in dataclasses.fields(flags.Config):
    assert f'--{field.name}=' in out
  assert max(map(len, out.splitlines())) <= 100


# --- Bad data, budgets and folders -------------------------------------------

SMALL = ['--preset=smoke', '--model=mlp', '--pairs=0']
SPLIT = flags.parse(SMALL).train_split


def refused(argv, capsys, folder):
  before = sorted(folder.rglob('*')) if folder.exists() else None
  assert prune.main([*SMALL, *argv, f'--workdir={folder}']) == 2
  assert (sorted(folder.rglob('*')) if folder.exists() else None) == before
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  return err


def test_bad_data_are_refused(capsys, tmp_path, monkeypatch):
  monkeypatch.delenv('JAXPRUNE_DATA', raising=False)
  run = tmp_path / 'run'
  text = refused(['--dataset=digts'], capsys, run)
  assert "no data set 'digts'" in text
  nowhere = f'--data_dir={tmp_path / "nowhere"}'
  assert 'nowhere does not exist' in refused([nowhere], capsys, run)
  damaged = digits.prepare(tmp_path / 'sets')
  for file in damaged.glob('*.array_record*'):
    file.write_bytes(file.read_bytes()[:1000])
  text = refused([f'--data_dir={tmp_path / "sets"}'], capsys, run)
  assert 'damaged' in text


def test_a_budget_that_cannot_be_met_is_refused(capsys, tmp_path):
  text = refused(['--macs=1e-6', '--method=channel'], capsys, tmp_path / 'run')
  assert '--macs=1e-06: ' in text


def test_what_does_not_fit_the_data_is_refused(capsys, tmp_path):
  text = refused(['--batch=1000'], capsys, tmp_path / 'run')
  assert '--batch=1000 must be at most the 230 examples to train on' in text
  text = refused(['--model=lenet5'], capsys, tmp_path / 'run')
  assert '--model=lenet5 does not take images of 8x8x1' in text


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['jit', 'pmap'])
def test_the_job_runs_on_several_devices(parallel, tmp_path, capsys):
  split = ['--devices=4', f'--parallel={parallel}', '--method=pdp']
  split += ['--distill=0.5', '--mixup=0.2', '--stream']
  assert prune.main([*SMALL, *split, f'--workdir={tmp_path}']) == 0
  assert 'PDP' in capsys.readouterr().out


def test_the_folder_of_another_run_is_left_alone(capsys, tmp_path):
  config = flags.parse([*SMALL, f'--workdir={tmp_path / "run"}'])
  workdir.claim(config)
  text = refused(['--seed=1'], capsys, tmp_path / 'run')
  assert 'written by another configuration: --seed=0 (now 1)' in text
  (tmp_path / 'run' / 'config.json').write_text('{')
  assert 'config.json is damaged' in refused([], capsys, tmp_path / 'run')
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').write_text('')
  text = refused([], capsys, tmp_path / 'mine')
  assert 'is not empty and holds no run' in text


# --- Training ----------------------------------------------------------------


@pytest.fixture(scope='module')
def toy():
  """A linear problem of two classes, and how to train on it."""
  images = np.zeros((32, 2, 2, 1), np.uint8)
  images[::2, 0], images[1::2, 1] = 9, 9
  examples = train.Examples(
    jnp.asarray(images), jnp.asarray(np.arange(32) % 2, jnp.int32)
  )
  module = models.MLP(hidden=(4,), num_classes=2)
  initial = module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
  prepare = train.preparation(images)

  def setup(*links, view=lambda params, _: params):
    tx = recipes.sgd(0.5, 1e-4, 8, *links)
    step = train.make_step(
      module.apply, tx, prepare, change=lambda key, x: x, view=view
    )
    state = train.State(initial['params'], {}, tx.init(initial['params']))
    return step, state

  return module, prepare, examples, setup


def test_it_learns_and_evaluates(toy):
  module, prepare, examples, setup = toy
  step, state = setup()
  run = train.make_runner(step, seed=0, batch=8)
  state = train.own(state)
  for epoch in range(2):
    state, metrics = run(state, examples, epoch, 0, 4)
  assert metrics.loss.shape == (4,)
  evaluate = train.make_evaluate(module.apply, prepare)
  assert evaluate(train.variables(state), examples) == 1.0
  wrong = examples._replace(labels=1 - examples.labels)
  assert evaluate(train.variables(state), wrong) == 0.0


def test_an_epoch_is_the_same_in_parts_and_fused(toy):
  _, _, examples, setup = toy
  step, state = setup()
  whole, parts, fused = (
    train.make_runner(step, seed=3, batch=8, fused=fused)
    for fused in (False, False, True)
  )
  expected, metrics = whole(train.own(state), examples, 5, 0, 4)
  half, first = parts(train.own(state), examples, 5, 0, 3)
  half, last = parts(half, examples, 5, 3, 4)
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(half), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  losses = np.concatenate([first.loss, last.loss])
  np.testing.assert_array_equal(metrics.loss, losses)
  scanned, metrics2 = fused(train.own(state), examples, 5, 0, 4)
  np.testing.assert_allclose(metrics2.loss, metrics.loss, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(scanned), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  other, _ = whole(train.own(state), examples, 6, 0, 4)
  kernel = lambda s: s.params['head']['kernel']
  assert np.any(kernel(other) != kernel(expected))  # Another order.


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('parallel', ['jit', 'pmap'])
@pytest.mark.parametrize('devices', [slow(2), 4])
def test_several_devices_train_as_one(toy, parallel, devices, fused):
  _, _, examples, setup = toy
  step, state = setup()
  one = train.make_runner(step, seed=3, batch=8, fused=False)
  several = train.make_runner(
    step, seed=3, batch=8, fused=fused, devices=devices, parallel=parallel
  )
  expected, metrics = one(train.own(state), examples, 5, 0, 4)
  found, metrics2 = several(train.own(state), examples, 5, 0, 2)
  found, metrics3 = several(found, examples, 5, 2, 4)
  losses = np.concatenate([metrics2.loss, metrics3.loss])
  np.testing.assert_allclose(losses, metrics.loss, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class Dropped(nn.Module):
  """Logits are what dropout leaves of a parameter."""

  @nn.compact
  def __call__(self, x, train=False):
    ones = self.param('ones', nn.initializers.ones, (1000,))
    rows = jnp.broadcast_to(ones, (len(x), 1000))
    return nn.Dropout(0.5, deterministic=not train)(rows)


def kept(toy, parallel='jit', devices=1, epoch=0):
  """Returns which logits of each step's examples survived dropout."""
  _, prepare, examples, _ = toy
  module, tx = Dropped(), optax.sgd(0.0)
  seen = []

  def loss(logits, labels, images):
    jax.debug.callback(lambda x: seen.append(np.asarray(x) > 0), logits)
    return train.cross_entropy(logits, labels, images)

  step = train.make_step(
    module.apply, tx, prepare, change=lambda key, x: x, loss=loss
  )
  params = {'ones': jnp.ones(1000)}
  state = train.State(params, {}, tx.init(params))
  run = train.make_runner(
    step, seed=3, batch=8, fused=False, devices=devices, parallel=parallel
  )
  run(state, examples, epoch, 0, 2)
  jax.effects_barrier()
  return seen


def test_every_step_drops_out_anew_and_the_same_again(toy):
  first, second = kept(toy)
  assert first.shape == (8, 1000)
  assert abs(first.mean() - 0.5) < 0.05
  assert abs((first == second).mean() - 0.5) < 0.05
  np.testing.assert_array_equal(kept(toy)[0], first)


def test_every_device_drops_out_by_a_key_of_its_own(toy):
  masks = kept(toy, 'pmap', 2)
  assert [x.shape for x in masks] == [(4, 1000)] * 4
  for i, a in enumerate(masks):
    for b in masks[:i]:
      assert abs((a == b).mean() - 0.5) < 0.05


def test_mixed_targets_reach_the_loss_and_the_labels_the_accuracy(toy):
  module, prepare, examples, setup = toy
  _, state = setup()

  def mix(key, images, labels):
    return augment.mixup(key, images, jax.nn.one_hot(labels, 2))

  step = train.make_step(
    module.apply,
    recipes.sgd(0.5, 1e-4, 8),
    prepare,
    change=lambda key, x: x,
    mix=mix,
  )
  rows, key = jnp.arange(8), jax.random.key(1)
  _, metrics = jax.jit(step)(state, examples, rows, key)
  images = prepare(examples.images[rows])
  mixed, targets = mix(
    jax.random.fold_in(key, train._MIX), images, examples.labels[rows]
  )
  assert np.any((targets > 0) & (targets < 1))
  logits = module.apply({'params': state.params}, mixed)
  expected = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))
  np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
  hits = jnp.argmax(logits, -1) == examples.labels[rows]
  np.testing.assert_allclose(metrics.accuracy, hits.mean())


def read_on(examples, batch, seed):
  """Returns examples as a stream, and the steps at which it was begun."""
  begun, size = [], len(examples.labels)
  images, labels = map(np.asarray, examples)

  def begin(step):
    begun.append(step)
    for t in itertools.count(step):
      epoch, place = divmod(t, size // batch)
      rows = data.epoch_batches(seed, epoch, size=size, batch=batch)[place]
      yield images[rows], labels[rows]

  return train.Stream(begin, size), begun


@pytest.mark.parametrize(
  ('devices', 'parallel'), [(1, 'jit'), (4, 'jit'), slow(4, 'pmap')]
)
def test_a_stream_trains_to_the_same_bits(toy, devices, parallel):
  _, _, examples, setup = toy
  step, state = setup()
  make = lambda: train.make_runner(
    step, seed=3, batch=8, fused=True, devices=devices, parallel=parallel
  )
  held = train.make_runner(
    step, seed=3, batch=8, fused=False, devices=devices, parallel=parallel
  )
  expected = train.own(state)
  for epoch in (0, 1):
    expected, metrics = held(expected, examples, epoch, 0, 4)
  stream, begun = read_on(examples, 8, 3)
  run = make()
  found, _ = run(train.own(state), stream, 0, 0, 3)
  found, _ = run(found, stream, 0, 3, 4)
  found, first = run(found, stream, 1, 0, 1)
  assert begun == [0]  # It was read on, and not begun anew.
  found, rest = make()(found, stream, 1, 1, 4)  # After a restart.
  assert begun == [0, 5]
  losses = np.concatenate([first.loss, rest.loss])
  np.testing.assert_array_equal(losses, metrics.loss)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  run(found, stream, 0, 2, 3)  # Another place than where it stood.
  assert begun == [0, 5, 2]


def test_what_cannot_be_split_over_devices_is_refused(toy):
  step, _ = toy[3]()
  with pytest.raises(ValueError, match='9 devices were asked for, JAX sees 4'):
    train.make_runner(step, seed=0, batch=9, devices=9)
  with pytest.raises(ValueError, match=r'batch of 10 .* 4 devices; take 8'):
    train.make_runner(step, seed=0, batch=10, devices=4)


@pytest.mark.parametrize(
  'name', [n if n == 'pdp' else slow(n) for n in flags.UNSTRUCTURED]
)
def test_a_method_ends_at_the_asked_number_of_zeros(toy, name):
  _, _, examples, setup = toy
  method = flags.UNSTRUCTURED[name](0.7, 8)
  step, state = setup(method.link, view=method.view)
  run = train.make_runner(step, seed=0, batch=8)
  state = train.own(state)
  for epoch in range(2):
    state, _ = run(state, examples, epoch, 0, 4)
  pairs = methods.zeros(state.params)
  assert sum(n for _, n in pairs.values()) == 4 * 4 + 4 * 2
  assert sum(z for z, _ in pairs.values()) == round(0.7 * 24)


# What the flags of the recipes change in the first step of the main job.


def asked(*argv):
  """Returns the task of a run, its first step, state, batch and key."""
  config = flags.parse([*SMALL, *argv])
  task = tasks.prepare(config)
  setup = tasks.set_up(task, tasks.schedule(config)[0], None)
  size, batch = task.source.size, config.batch
  rows = data.epoch_batches(config.seed, 0, size=size, batch=batch)[0]
  state, key = setup.start(task.initial), data.step_key(config.seed, 0, 0)
  return task, setup, state, rows, key


def entropy(logits, targets):
  return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))


def shifted(key, images):
  return augment.random_crop(key, images, 1)


def cut(key, images):
  first, second = jax.random.split(key)
  return augment.cutout(second, shifted(first, images), 3)


def mixed(key, images, targets):
  mixing = jax.random.fold_in(key, train._MIX)
  return augment.mixup(mixing, shifted(key, images), targets, 0.4)


smooth = lambda targets: 0.8 * targets + 0.2 / 10


@pytest.mark.parametrize(
  ('argv', 'expected'),
  [
    (['--cutout=3'], lambda f, key, x, y: entropy(f(cut(key, x)), y)),
    (
      ['--mixup=0.4', '--label_smoothing=0.2'],
      lambda f, key, x, y: (lambda x, y: entropy(f(x), smooth(y)))(
        *mixed(key, x, y)
      ),
    ),
  ],
)
def test_a_flag_of_the_loss_does_what_it_says(argv, expected):
  task, setup, state, rows, key = asked(*argv)
  examples = task.source.examples
  step = jax.jit(tasks.make_step(task, setup, None))
  _, metrics = step(state, examples, rows, key)
  x = task.prepare(examples.images[rows])
  y = jax.nn.one_hot(examples.labels[rows], 10)
  loss = expected(lambda x: task.fn(task.initial, x), key, x, y)
  np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)


def test_the_pruned_networks_learn_from_the_dense_one():
  task, setup, state, rows, key = asked('--distill=0.3')
  dense = jax.tree.map(lambda w: 1.5 * w + 0.01, task.initial)
  examples = task.source.examples
  x = shifted(key, task.prepare(examples.images[rows]))
  own, taught = task.fn(task.initial, x), task.fn(dense, x)
  y = jax.nn.one_hot(examples.labels[rows], 10)
  soft = jax.nn.softmax(taught / 4)
  far = entropy(own / 4, soft) - entropy(taught / 4, soft)
  for teacher, loss in (
    (None, entropy(own, y)),
    (dense, 0.3 * 16 * far + 0.7 * entropy(own, y)),
  ):
    step = jax.jit(tasks.make_step(task, setup, teacher))
    _, metrics = step(state, examples, rows, key)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-4)


def test_what_training_computes_in_leaves_the_task_alone():
  task, setup, state, rows, key = asked(
    '--model=resnet_digits', '--dtype=bfloat16', '--remat', '--optimizer=adam'
  )
  step = tasks.make_step(task, setup, None)
  traced = jax.make_jaxpr(step)(state, task.source.examples, rows, key)
  text = str(traced)
  assert 'remat' in text
  kernels = re.findall(r'(\w+)\[[\d,]+\] = conv_general_dilated', text)
  assert len(kernels) > 10
  assert set(kernels) == {'bf16'}
  assert task.module.dtype == jnp.float32
  assert not task.module.remat
  assert optax.tree.get(state.opt_state, 'nu') is not None


def test_the_average_is_the_result():
  task, setup, state, rows, key = asked('--ema=0.75')
  step = jax.jit(tasks.make_step(task, setup, None))
  for _ in range(3):
    state, _ = step(state, task.source.examples, rows, key)
  found = tasks.trained(task, state)
  average = optax.tree.get(state.opt_state, 'average')
  np.testing.assert_array_equal(
    found['params']['head']['kernel'], average['head']['kernel']
  )
  raw = state.params['head']['kernel']
  assert np.any(found['params']['head']['kernel'] != raw)


def test_a_streamed_split_is_the_one_in_memory():
  options = [*SMALL, '--validation=0.2', '--batch=50']
  held, streamed = (
    sources.read(flags.parse([*options, *more])) for more in ([], ['--stream'])
  )
  assert streamed.size == held.size == 205
  for seed_epoch, step in ((0, 2), (1, 1)):
    rows = data.epoch_batches(0, seed_epoch, size=205, batch=50)[step]
    found = next(streamed.examples.begin(4 * seed_epoch + step))
    for a, b in zip(found, held.examples, strict=True):
      np.testing.assert_array_equal(a, b[rows])
  rows = lambda images: sorted(np.asarray(x).tobytes() for x in images)
  assert rows(streamed.held.images) == rows(held.held.images)
  assert rows(streamed.sample) == rows(held.sample)
  assert len(held.sample) == 256


def test_photos_are_cut_to_squares_as_they_stream():
  config = flags.parse([*SMALL, '--stream', '--side=5'])
  task = tasks.prepare(config)
  assert task.test.images.shape == (64, 5, 5, 1)
  middle = augment.center_crop(data.load('digits', 'test').images[0], side=5)
  np.testing.assert_array_equal(task.test.images[0], middle)
  assert task.source.held.images.shape == (26, 5, 5, 1)
  take = lambda step: next(task.source.examples.begin(step))[0]
  first, again, later = take(0), take(0), take(3)
  assert first.shape == (64, 5, 5, 1)
  np.testing.assert_array_equal(first, again)
  assert np.any(first != later)  # Other examples, and other parts of them.


def test_the_sample_of_a_large_set_is_spread_over_it(monkeypatch):
  monkeypatch.setattr(sources, 'SAMPLE', 100)
  whole = data.load('digits', SPLIT).images
  found = sources.read(flags.parse(SMALL)).sample
  np.testing.assert_array_equal(found, whole[::3])


def test_split_off_parts_the_examples():
  images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
  labels = np.arange(10, dtype=np.int32)
  rest, held = train.split_off(images, labels, 0.3, 0)
  assert held is not None
  assert (len(rest.labels), len(held.labels)) == (7, 3)
  together = np.concatenate([rest.labels, held.labels])
  np.testing.assert_array_equal(np.sort(together), labels)
  np.testing.assert_array_equal(held.images[:, 0, 0, 0] // 4, held.labels)
  assert train.split_off(images, labels, 0.0, 0)[1] is None


def test_the_interval_is_wilsons():
  # By hand: p = 1, n = 4: (1, 4 / (4 + z^2)) with z = 1.96.
  low, high = train.interval(1.0, 4)
  assert high == 1.0
  assert low == pytest.approx(4 / (4 + 1.96**2))


def test_the_clock_counts_cpu_time():
  def work(n):
    total = 0
    for i in range(n):
      total += i
    return np.int32(0)

  ticks = []
  found = timing.milliseconds(
    {'slow': lambda: work(200_000), 'fast': lambda: work(50_000)},
    pairs=5,
    least=0.002,
    tick=lambda: ticks.append(0),
  )
  assert len(ticks) == 5
  assert found['slow'][1] == 1.0
  assert 2 < found['fast'][1] < 8
  assert found['slow'][0] > found['fast'][0] > 0
  idle = timing.milliseconds({'a': lambda: time.sleep(0.01)}, pairs=2)
  assert idle['a'][0] < 5  # Waiting is no work.


# --- The job -----------------------------------------------------------------


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
  """The folder of a whole run, as small as it gets, and what it printed."""
  folder = tmp_path_factory.mktemp('runs') / 'smoke'
  argv = ['--preset=smoke', f'--workdir={folder}']
  capture = pytest.MonkeyPatch()
  printed = []
  capture.setattr('builtins.print', lambda *a, **k: printed.append(a))
  try:
    assert prune.main(argv) == 0
  finally:
    capture.undo()
  return folder, argv, printed


def test_the_run_folder_is_complete(smoke):
  folder, _, _ = smoke
  config = json.loads((folder / 'config.json').read_text())
  assert config['seed'] == config['flags']['seed'] == 0
  assert config['versions']['jax'] == jax.__version__
  assert config['device']['platform'] == jax.devices()[0].platform
  records = report.read_metrics(folder / 'metrics.jsonl')
  assert [r['run'] for r in records] == ['dense'] * 2 + ['channel'] + [
    'pdp'
  ] * 2
  assert [r['step'] for r in records] == [3, 6, 9, 12, 15]
  assert all(
    {'loss', 'accuracy', 'sparsity', 'seconds'} <= set(r) for r in records
  )
  page = (folder / 'report.html').read_text()
  assert '<svg' in page
  assert 'src=' not in page
  assert not list(folder.glob('*.tmp'))


def test_the_proofs_hold_and_the_counts_are_exact(smoke):
  folder, _, _ = smoke
  finished = json.loads((folder / 'results.json').read_text())
  assert [check['passed'] for check in finished['checks']] == [True] * 6
  dense, channel, pdp = finished['results']
  assert channel['macs'] <= 0.5 * dense['macs']
  assert channel['bytes'] < 0.7 * dense['bytes']
  assert dense['nonzeros'] == dense['parameters'] == pdp['parameters']
  weights = checkpoint.load_arrays(folder / 'pdp.npz')
  kernels = [w for path, w in weights.items() if path.endswith('kernel')]
  size = sum(w.size for w in kernels)
  assert sum(np.sum(w == 0) for w in kernels) == round(0.9 * size)


def test_what_is_removed_crosses_add_projection_and_flatten(smoke):
  folder, argv, _ = smoke
  config = flags.parse(argv)
  module = flags.network(config, 10)
  x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  graph = jp.trace(lambda v, x: module.apply(v, x), shapes, x)
  plan = plans.from_json((folder / 'plan.json').read_text())
  members = [
    {
      (m.path.removeprefix('params/'), m.axis)
      for m in graph.groups[name].members
    }
    for name, _ in plan.kept
  ]
  crosses = lambda *slices: any(set(slices) <= group for group in members)
  add = ('stem/kernel', 3), ('stage1_block1/conv2/kernel', 3)
  assert crosses(*add)
  projection = (
    ('stage2_block1/shortcut/kernel', 3),
    ('stage2_block1/conv2/kernel', 3),
  )
  assert crosses(*projection)
  assert crosses(('stage3_block1/conv2/kernel', 3), ('head/kernel', 0))


def test_the_program_needs_the_file_alone(smoke):
  folder, argv, _ = smoke
  config = flags.parse(argv)
  plan = plans.from_json((folder / 'plan.json').read_text())
  weights = checkpoint.load_arrays(folder / 'channel.npz')
  widths = {
    path.removeprefix('params/').removesuffix('/kernel'): w.shape[-1]
    for path, w in weights.items()
    if path.endswith('kernel')
  }
  assert plan.kept
  module = flags.network(config, 10).clone(widths=widths)
  variables: dict = {}
  for path, w in weights.items():
    *parents, name = path.split('/')
    node = variables
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = w
  x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  expected = np.asarray(jax.jit(module.apply)(variables, x))
  found = io.load_stablehlo(folder / 'channel.stablehlo')(x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_finished_run_prints_again_and_changes_nothing(smoke, capsys):
  folder, argv, printed = smoke
  times = lambda: {f: f.stat().st_mtime_ns for f in folder.rglob('*')}
  before = times()
  assert prune.main(argv) == 0
  assert times() == before
  out = capsys.readouterr().out
  assert 'channel-pruned' in out
  assert out == ''.join(' '.join(map(str, line)) + '\n' for line in printed)
  assert prune.main([*argv, '--seed=4']) == 2
  assert times() == before


def test_damaged_checkpoints_are_not_written_over(smoke, tmp_path, capsys):
  folder = shutil.copytree(smoke[0], tmp_path / 'run')
  (folder / 'results.json').unlink()
  for file in (folder / 'checkpoints').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  log = (folder / 'metrics.jsonl').read_bytes()
  assert prune.main([*smoke[1], f'--workdir={folder}']) == 2
  err = capsys.readouterr().err
  assert 'can be read' in err
  assert 'Remove that folder to begin again.' in err
  assert (folder / 'metrics.jsonl').read_bytes() == log


# --- Slow: the promises ------------------------------------------------------


def without_times(result):
  """Returns the figures of a network, or a line of the log, less its times."""
  is_time = lambda name: name.startswith(('ms_', 'speed_', 'seconds'))
  return {name: x for name, x in result.items() if not is_time(name)}


def digest(folder):
  """Returns all that a user reads of a run, times aside, and its last state."""
  steps = [f for f in (folder / 'checkpoints').iterdir() if f.name.isdigit()]
  last = max(steps, key=lambda f: int(f.name))
  record = json.loads((last / 'record' / 'metadata').read_text())
  finished = json.loads((folder / 'results.json').read_text())
  page = (folder / 'report.html').read_text().replace(str(folder), 'FOLDER')
  return {
    'step': last.name,
    'leaves': record['leaves'],
    'metadata': record['metadata'],
    'metrics': list(
      map(without_times, report.read_metrics(folder / 'metrics.jsonl'))
    ),
    'results': list(map(without_times, finished['results'])),
    'table': report.table(prune.table(finished['results'])),
    'checks': finished['checks'],
    'report': page,
    **{
      file.name: file.read_bytes()
      for pattern in ('*.npz', '*.stablehlo', 'plan.json')
      for file in folder.glob(pattern)
    },
  }


def command(folder, *more):
  return [
    sys.executable, '-m', 'experiments.prune', '--preset=smoke', '--pairs=0',
    '--epochs=4', '--tune_epochs=2', '--prune_epochs=3',
    f'--workdir={folder}', *more,
  ]  # fmt: skip


def kill(folder, moment, *more, timeout=300):
  """Starts the job, and kills it once ``moment()`` is true."""
  job = subprocess.Popen(
    command(folder, *more), cwd=ROOT, env=PLAIN, stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )  # fmt: skip
  try:
    end = time.monotonic() + timeout
    while not moment():
      assert job.poll() is None, 'The job ended before it was killed.'
      assert time.monotonic() < end
      time.sleep(0.001)
  finally:
    os.kill(job.pid, signal.SIGKILL)
    job.wait()


def lines(folder):
  log = folder / 'metrics.jsonl'
  return log.read_bytes().count(b'\n') if log.exists() else 0


def log_of(folder):
  """Returns the log, in which each line names its stage."""
  log = folder / 'metrics.jsonl'
  return log.read_text() if log.exists() else ''


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'whole'
  subprocess.run(
    command(folder), cwd=ROOT, env=PLAIN, check=True, capture_output=True
  )
  return digest(folder)


def assert_same_run(folder, expected, but=()):
  found = digest(folder)
  assert found.keys() == expected.keys()
  for key in expected.keys() - set(but):
    assert found[key] == expected[key], key


@pytest.mark.slow
@pytest.mark.parametrize(
  'moment', ['training', 'checkpoint', 'pruned', 'last stage', 'measuring']
)
def test_killed_and_resumed_ends_with_the_same_bytes(
  moment, uninterrupted, tmp_path
):
  folder, draw = tmp_path / 'run', random.Random(moment)
  saving = lambda: any((folder / 'checkpoints').glob('*tmp*'))
  if moment == 'training':
    count = draw.choice([1, 2, 3, 7, 8])
    kill(folder, lambda: lines(folder) >= count)
    assert lines(folder) < 9
  elif moment == 'checkpoint':
    for _ in range(5):  # It may be over before the signal arrives.
      count = lines(folder) + 1
      kill(folder, lambda n=count: lines(folder) >= n and saving())
      if saving():
        break
    assert saving()
  elif moment == 'last stage':  # There are checkpoints with several networks.
    kill(folder, lambda: 'pdp' in log_of(folder))
  elif moment == 'measuring':
    kill(folder, lambda: (folder / 'dense.npz').exists())
    assert not (folder / 'results.json').exists()
  else:
    kill(folder, lambda: (folder / 'plan.json').exists())
    records = report.read_metrics(folder / 'metrics.jsonl')
    assert {record['run'] for record in records} == {'dense'}
  again = subprocess.run(
    command(folder),
    cwd=ROOT,
    env=PLAIN,
    check=True,
    capture_output=True,
    text=True,
  )
  assert_same_run(folder, uninterrupted)
  table = digest(folder)['table']
  assert again.stdout.startswith(table)


@pytest.mark.slow
def test_killed_and_resumed_a_stream_ends_with_the_bytes_of_memory(
  uninterrupted, tmp_path
):
  folder = tmp_path / 'run'
  kill(folder, lambda: lines(folder) >= 3, '--stream')
  subprocess.run(
    command(folder, '--stream'),
    cwd=ROOT,
    env=PLAIN,
    check=True,
    capture_output=True,
  )
  # The proof takes other images there, and the page says --stream.
  assert_same_run(folder, uninterrupted, but=('checks', 'report'))


@pytest.mark.slow
def test_all_recipes_together_keep_the_proofs(tmp_path, capsys):
  argv = ['--preset=smoke', '--pairs=0', '--optimizer=adam', '--cutout=2']
  argv += ['--mixup=0.2', '--label_smoothing=0.1', '--ema=0.5', '--distill=0.5']
  argv += ['--dtype=bfloat16', '--remat', '--stream', f'--workdir={tmp_path}']
  assert prune.main(argv) == 0
  assert 'FAILS' not in capsys.readouterr().out


@pytest.mark.slow
def test_three_seeds_keep_the_promise(tmp_path):
  figures: dict[str, list[dict]] = {}
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  for seed in range(3):
    folder = tmp_path / str(seed)
    job = [sys.executable, '-m', 'experiments.prune', f'--seed={seed}']
    job += [f'--workdir={folder}']
    subprocess.run(job, cwd=ROOT, env=environment, check=True)
    results = json.loads((folder / 'results.json').read_text())['results']
    for result in results:
      figures.setdefault(result['network'], []).append(result)
  accuracy = {
    name: statistics.mean(r['accuracy'] for r in found)
    for name, found in figures.items()
  }
  print(accuracy, [r['speed_64'] for r in figures['channel']])
  assert min(r['accuracy'] for r in figures['dense']) >= 0.97
  assert accuracy['channel'] >= accuracy['dense'] - 0.02
  assert accuracy['pdp'] >= accuracy['dense'] - 0.02
  for dense, channel in zip(figures['dense'], figures['channel'], strict=True):
    assert channel['macs'] <= 0.5 * dense['macs']
    assert channel['speed_64'] >= 1.5


@pytest.mark.data
@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'cifar10'])
def test_the_same_command_runs_on_other_sets(name, tmp_path):
  if not os.environ.get('JAXPRUNE_DATA'):
    pytest.skip('JAXPRUNE_DATA names no folder.')
  argv = ['--preset=smoke', f'--dataset={name}', '--method=channel']
  argv += ['--model=mlp'] if name == 'cifar10' else []  # A resnet20 is slow.
  assert prune.main([*argv, '--pairs=0', f'--workdir={tmp_path / name}']) == 0
