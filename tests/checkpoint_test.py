import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import tree as tree_lib
from jaxprune.io import checkpoint


def make_state(seed=0):
  """Every kind of leaf that a run holds."""
  key = jax.random.key(seed)
  params = {
    'dense': {'kernel': jax.random.normal(key, (4, 3)), 'bias': jnp.zeros(3)},
    'half': jnp.arange(5.0).astype(jnp.bfloat16) / 3 + seed,
  }
  masks = {
    'dense': {
      'kernel': params['dense']['kernel'] > 0,
      'bias': optax.MaskedNode(),
    },
    'half': optax.MaskedNode(),
  }
  tx = optax.chain(optax.adamw(1e-3), optax.trace(0.9))
  return {
    'params': params,
    'opt_state': tx.init(params),
    'masks': masks,
    'key': key,
    'raw_key': jax.random.PRNGKey(3),
    'scalar': np.float32(1.5 + seed),
    'host': np.arange(6, dtype=np.int64).reshape(2, 3),
    'count': 7 + seed,
    'rate': 0.1,
    'on': True,
    'empty': jnp.zeros((0, 3)),
    'nothing': None,
  }


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    tree_lib.leaves(a).items(), jax.tree.leaves(b), strict=True
  ):
    assert type(x) is type(y), path
    if isinstance(x, jax.Array) and jnp.issubdtype(
      x.dtype, jax.dtypes.prng_key
    ):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype, path
    assert x.shape == y.shape, path
    assert x.tobytes() == y.tobytes(), path


def largest(folder):
  """The array data of a step."""
  files = [f for f in folder.rglob('d/*') if f.is_file()]
  return max(files, key=lambda f: f.stat().st_size)


def test_dicts_come_back_in_the_order_of_the_template(tmp_path):
  moments = optax.adam(1e-3).init({'z': jnp.ones(2), 'a': jnp.ones(2)})
  stages = {'dense': jnp.zeros(2), 'channel': {'z': 1, 'a': [{'y': 2, 'b': 3}]}}
  state = {'stages': stages, 'moments': moments}
  with checkpoint.Checkpointer(tmp_path) as keeper:
    keeper.save(0, state)
    state = keeper.restore(state).state
  assert list(state) == ['stages', 'moments']
  assert list(state['stages']) == ['dense', 'channel']
  assert list(state['stages']['channel']) == ['z', 'a']
  assert list(state['stages']['channel']['a'][0]) == ['y', 'b']
  assert jax.tree.structure(state['moments']) == jax.tree.structure(moments)


def test_every_kind_of_leaf_comes_back(tmp_path):
  state = make_state()
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, state, {'stage': 'prune', 'loss': 0.1, 'n': [1, None]})
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    restored = checkpoints.restore(make_state(seed=1))
  assert restored.step == 3
  assert restored.metadata == {'stage': 'prune', 'loss': 0.1, 'n': [1, None]}
  assert_same(restored.state, state)


def test_the_last_steps_are_kept(tmp_path):
  with checkpoint.Checkpointer(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == ()
    for step in (1, 5, 9):
      checkpoints.save(step, {'w': jnp.full(3, step)})
    assert checkpoints.steps() == (5, 9)
    restored = checkpoints.restore({'w': jnp.zeros(3, int)}, step=5)
    np.testing.assert_array_equal(restored.state['w'], [5, 5, 5])


def test_abstract_template_and_a_template_by_metadata(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {'w': jnp.arange(4.0)}, {'width': 4})
    template = lambda m: {'w': jax.ShapeDtypeStruct((m['width'],), jnp.float32)}
    for like in (template, template({'width': 4})):
      w = checkpoints.restore(like).state['w']
      assert isinstance(w, jax.Array)
      np.testing.assert_array_equal(w, np.arange(4.0))


def test_shards_go_where_the_template_says(tmp_path):
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((4,), ('data',), axis_types=auto)
  spec = jax.sharding.PartitionSpec
  rows = jax.sharding.NamedSharding(mesh, spec('data'))
  whole = jax.sharding.NamedSharding(mesh, spec())
  x = jnp.arange(8.0)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(0, {'x': jax.device_put(x, rows)})
    for sharding in (rows, whole, jax.devices()[1]):
      like = {'x': jax.device_put(jnp.zeros(8), sharding)}
      found = checkpoints.restore(like).state['x']
      assert found.sharding == like['x'].sharding
      np.testing.assert_array_equal(found, x)


def test_background_saves_are_there_after_close(tmp_path):
  with checkpoint.Checkpointer(tmp_path, background=True) as checkpoints:
    for step in range(3):
      checkpoints.save(step, {'w': jnp.full(1000, step)})
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == (0, 1, 2)
    restored = checkpoints.restore({'w': jnp.zeros(1000, int)})
  assert restored.state['w'][0] == 2


@pytest.mark.parametrize('part', ['array', 'record', 'truncated', 'removed'])
def test_a_damaged_step_gives_way_to_the_one_before(tmp_path, part):
  state = lambda step: {'a': {'kernel': jnp.arange(100.0) + step}, 'b': step}
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, state(step), {'stage': f'at {step}'})
  folder = tmp_path / '20'
  if part == 'array':
    file = largest(folder)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
  elif part == 'record':
    file = folder / 'record' / 'metadata'
    file.write_text(file.read_text().replace('at 20', 'at 21'))
  elif part == 'truncated':
    os.truncate(largest(folder), 10)
  else:
    largest(folder).unlink()
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    text = (
      r'step 20 is damaged .its files (\S+) have changed.: restored step 10'
    )
    with pytest.warns(UserWarning, match=text):
      restored = checkpoints.restore(state(0))
    assert (restored.step, restored.metadata) == (10, {'stage': 'at 10'})
    assert_same(restored.state, state(10))
    # Going on removes the damaged step and comes past its number again.
    checkpoints.save(15, state(15))
    assert checkpoints.steps() == (10, 15)
    checkpoints.save(20, state(20))
    assert_same(checkpoints.restore(state(0)).state, state(20))


def test_other_values_are_found_and_the_leaf_named(tmp_path):
  # Orbax sees no harm in the arrays of another step.
  state = {'a': {'kernel': jnp.arange(4.0)}, 'b': jnp.ones(2)}
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    other = {'a': {'kernel': jnp.arange(4.0) + 1}, 'b': jnp.ones(2)}
    checkpoints.save(2, other)
  (tmp_path / '2' / 'files.json').unlink()
  shutil.rmtree(tmp_path / '2' / 'state')
  shutil.copytree(tmp_path / '1' / 'state', tmp_path / '2' / 'state')
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    text = (
      r'step 2 is damaged .the sha256 of a/kernel differs.: restored step 1'
    )
    with pytest.warns(UserWarning, match=text):
      assert checkpoints.restore(state).step == 1
    with pytest.raises(ValueError, match=r'No checkpoint in .* can be read: '):
      checkpoints.restore(state, step=2)
  file = tmp_path / '1' / 'record' / 'metadata'
  record = json.loads(file.read_text())
  file.write_text(json.dumps(record | {'metadata': {'stage': 'other'}}))
  (tmp_path / '1' / 'files.json').unlink()
  text = 'the sha256 of its record differs'
  with (
    checkpoint.Checkpointer(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=text),
  ):
    checkpoints.restore(state, step=1)


def test_a_template_that_does_not_fit_names_every_leaf(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {'a': jnp.zeros(3), 'b': jnp.zeros(2), 'c': 1})
    like = {'a': jnp.zeros(4), 'b': jnp.zeros(2, bool), 'd': 1}
    with pytest.raises(ValueError, match='The template does not fit') as caught:
      checkpoints.restore(like)
  text = str(caught.value)
  assert f'step 1 of {tmp_path}: ' in text
  assert "'a' is float32[3], wanted float32[4]; " in text
  assert "'b' is float32[2], wanted bool[2]; " in text
  assert "'c' is int[], wanted nothing; 'd' is nothing, wanted int[]." in text
  assert text.endswith('another configuration.')


def test_errors(tmp_path):
  with pytest.raises(ValueError, match='`keep` must be at least 1, got 0'):
    checkpoint.Checkpointer(tmp_path, keep=0)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(FileNotFoundError, match=r'no checkpoint in .* none'):
      checkpoints.restore({})
    with pytest.raises(TypeError, match=r"Leaf 'a/0' must be an array .* str"):
      checkpoints.save(1, {'a': ['text']})
    with pytest.raises(TypeError, match=r'metadata must be JSON data: .*set'):
      checkpoints.save(1, {'a': 1}, {'x': {1}})
    checkpoints.save(4, {'a': 1})
    for step in (3, 4):
      with pytest.raises(ValueError, match=f'Step {step} must be above .* 4'):
        checkpoints.save(step, {'a': 1})
    with pytest.raises(FileNotFoundError, match=r'of step 5 .* there: 4'):
      checkpoints.restore({'a': 1}, step=5)


def test_saving_a_small_state_is_quick(tmp_path):
  state = make_state()
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(0, state)
    times = []
    for step in range(1, 4):
      start = time.process_time()
      checkpoints.save(step, state)
      times.append(time.process_time() - start)
  assert min(times) < 0.3


def test_what_killed_saves_left_is_removed(tmp_path):
  left = tmp_path / '2.orbax-checkpoint-tmp'
  (left / 'state').mkdir(parents=True)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.steps() == ()
  assert not left.exists()


@pytest.mark.slow
def test_a_kill_during_a_save_never_loses_the_last_step(tmp_path):
  code = textwrap.dedent("""
    import sys
    import jax.numpy as jnp
    from jaxprune.io import checkpoint

    with checkpoint.Checkpointer(sys.argv[1]) as checkpoints:
      for step in range(max(checkpoints.steps(), default=-1) + 1, 10**6):
        print('begin', step, flush=True)
        checkpoints.save(step, {'w': jnp.full(500_000, step)})
        print('end', step, flush=True)
  """)
  rng = np.random.default_rng(0)
  for delay in (0.002, 0.005, 0.01, 0.015, *rng.uniform(0, 0.03, 4)):
    process = subprocess.Popen(
      [sys.executable, '-c', code, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
    )
    assert process.stdout is not None
    ends = 0
    for line in process.stdout:
      ends += line.startswith('end')
      if ends == 2 and line.startswith('begin'):
        time.sleep(delay)  # In the middle of the third save.
        process.send_signal(signal.SIGKILL)
        break
    done = int(line.split()[1]) - 1
    process.communicate()
    with checkpoint.Checkpointer(tmp_path) as checkpoints:
      restored = checkpoints.restore({'w': jnp.zeros(500_000, int)})
    assert not list(tmp_path.glob('*tmp*'))
    assert restored.step in (done, done + 1)
    assert (np.asarray(restored.state['w']) == restored.step).all()


# --- Weights as plain files --------------------------------------------------


def weights():
  return {
    'b': {'kernel': jnp.arange(6.0).reshape(2, 3), 'scale': np.float64(0.1)},
    'a': [jnp.array([True, False]), jnp.bfloat16(1.5), 3],
    'f': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
  }


def test_arrays_round_trip_and_numpy_reads_them(tmp_path):
  tree, path = weights(), tmp_path / 'weights.npz'
  size = checkpoint.save_arrays(path, tree)
  assert size == path.stat().st_size
  assert [f.name for f in tmp_path.iterdir()] == ['weights.npz']
  with np.load(path) as plain:
    assert sorted(plain.files) == [
      'a/0', 'a/1@bfloat16', 'a/2', 'b/kernel', 'b/scale', 'f',
    ]  # fmt: skip
    np.testing.assert_array_equal(plain['b/kernel'], tree['b']['kernel'])
  flat = checkpoint.load_arrays(path)
  assert flat['a/1'].dtype == jnp.bfloat16
  assert flat['a/1'].shape == ()
  like = jax.tree.map(np.asarray, tree)
  filled = checkpoint.load_arrays(path, like)
  for x, y in zip(jax.tree.leaves(like), jax.tree.leaves(filled), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    np.testing.assert_array_equal(x, y)


def test_same_arrays_same_bytes(tmp_path, monkeypatch):
  a, b, c = (tmp_path / f'{n}.npz' for n in 'abc')
  tree = weights()
  checkpoint.save_arrays(a, tree)
  monkeypatch.setattr(time, 'time', lambda: 2e9)
  backwards = collections.OrderedDict(reversed(tree.items()))
  backwards['f'] = np.ascontiguousarray(tree['f'])
  checkpoint.save_arrays(b, backwards)
  assert a.read_bytes() == b.read_bytes()
  tree['a'][2] = 4
  checkpoint.save_arrays(c, tree)
  assert a.read_bytes() != c.read_bytes()


def test_zeros_take_little_room(tmp_path):
  rng = np.random.default_rng(0)
  dense = rng.normal(size=10_000).astype('f4')
  sparse = np.where(rng.random(10_000) < 0.1, dense, 0)
  full = checkpoint.save_arrays(tmp_path / 'a.npz', {'w': dense})
  less = checkpoint.save_arrays(tmp_path / 'b.npz', {'w': sparse})
  assert less < 0.25 * full


def test_array_errors(tmp_path):
  path = tmp_path / 'a.npz'
  with pytest.raises(TypeError, match="Leaf 'k' is a typed PRNG key"):
    checkpoint.save_arrays(path, {'k': jax.random.key(0)})
  with pytest.raises(TypeError, match="Leaf 'k' must be an array"):
    checkpoint.save_arrays(path, {'k': 'text'})
  with pytest.raises(ValueError, match="'a@b' must not have an '@'"):
    checkpoint.save_arrays(path, {'a@b': 1})
  assert not list(tmp_path.iterdir())
  with pytest.raises(FileNotFoundError, match=r'a\.npz'):
    checkpoint.load_arrays(path)
  checkpoint.save_arrays(path, {'w': np.random.default_rng(0).random(1000)})
  with pytest.raises(ValueError, match=r"fit .*: 'w' is float64\[1000\], want"):
    checkpoint.load_arrays(path, {'w': np.zeros(3)})
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  with pytest.raises(ValueError, match=r'a\.npz is damaged \('):
    checkpoint.load_arrays(path)
  path.write_bytes(raw[:100])
  with pytest.raises(ValueError, match=r'a\.npz is damaged \('):
    checkpoint.load_arrays(path)
