import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

import jaxprune as jp
from jaxprune import io, models, plans


@pytest.fixture(scope='module')
def network():
  """A small convolutional network as a function of its images alone."""
  module = models.resnet.ResNet(
    channels=(4, 8), blocks=(1, 1), num_classes=3, stem='small', head='flatten'
  )
  x = jax.random.normal(jax.random.key(1), (5, 6, 6, 1))
  variables = jax.jit(module.init)(jax.random.key(0), x)
  return (lambda x: module.apply(variables, x)), x


@pytest.fixture(scope='module')
def artifact(network, tmp_path_factory):
  path = tmp_path_factory.mktemp('export') / 'network.stablehlo'
  fn, x = network
  assert io.save_stablehlo(path, fn, x[:1]) == path.stat().st_size
  return path


def test_the_same_values_at_other_batch_sizes(network, artifact):
  fn, x = network
  loaded = io.load_stablehlo(artifact)
  for n in (1, 5):
    expected = np.asarray(jax.jit(fn)(x[:n]))
    np.testing.assert_allclose(loaded(x[:n]), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
      jax.jit(loaded)(x[:n]), expected, rtol=1e-6, atol=1e-6
    )
  assert len(np.unique(np.asarray(loaded(x)))) == 15  # It reads its input.


def test_one_file_serves_several_platforms_through_plain_jax(artifact):
  exported = jax_export.deserialize(bytearray(artifact.read_bytes()))
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  assert str(exported.in_avals[0].shape[0]) == 'batch'
  assert [a.shape[1:] for a in exported.in_avals] == [(6, 6, 1)]


def test_reloads_without_the_python_of_the_model(network, artifact, tmp_path):
  fn, x = network
  np.save(tmp_path / 'x.npy', x)
  script = textwrap.dedent(f"""
    import sys
    for name in ('flax', 'jaxprune.models', 'optax'):
      sys.modules[name] = None  # An import of it raises.
    import numpy as np
    from jax import export
    content = open({str(artifact)!r}, 'rb').read()
    fn = export.deserialize(bytearray(content)).call
    x = np.load({str(tmp_path / 'x.npy')!r})
    np.save({str(tmp_path / 'y.npy')!r}, fn(x))
  """)
  subprocess.run([sys.executable, '-c', script], check=True)
  expected = np.asarray(jax.jit(fn)(x))
  found = np.load(tmp_path / 'y.npy')
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_fixed_shapes_and_several_arguments(tmp_path):
  fn = lambda a, b: a['w'] @ b
  args = ({'w': jnp.ones((2, 3))}, jnp.ones(3))
  io.save_stablehlo(tmp_path / 'fn', fn, *args, batch=None, platforms=['cpu'])
  loaded = io.load_stablehlo(tmp_path / 'fn')
  np.testing.assert_array_equal(loaded(*args), [3.0, 3.0])
  with pytest.raises(ValueError, match='shape'):
    loaded({'w': jnp.ones((4, 3))}, jnp.ones(3))


def test_a_damaged_file_is_refused(artifact, tmp_path):
  content = bytearray(artifact.read_bytes())
  content[len(content) // 2] ^= 1
  damaged = tmp_path / 'damaged'
  for bad in (bytes(content), artifact.read_bytes()[:-40], b''):
    damaged.write_bytes(bad)
    with pytest.raises(ValueError, match=r'damaged.*damaged, or not written'):
      io.load_stablehlo(damaged)
  with pytest.raises(FileNotFoundError):
    io.load_stablehlo(tmp_path / 'nothing')


def test_what_cannot_be_exported_is_named(tmp_path):
  path = tmp_path / 'fn'
  with pytest.raises(ValueError, match=r'got 0 of shape \(\).*batch=None'):
    io.save_stablehlo(path, lambda x: x, jnp.float32(1))
  with pytest.raises(ValueError, match='got no array'):
    io.save_stablehlo(path, lambda: jnp.ones(2))
  with pytest.raises(ValueError, match='cpu, cuda, tpu, rocm, got abacus'):
    io.save_stablehlo(path, lambda x: x, jnp.ones(2), platforms=['abacus'])
  assert not path.exists()


def test_a_specialised_network_comes_back_on_every_platform(tmp_path):
  """Half of its channels, and a batch that stays open."""

  def net(p, x):
    x = jnp.tanh(x @ p['a']).reshape(x.shape[0], 2, 6)
    x = (x - x.mean(-1, keepdims=True)) * p['scale'][None, None]
    return jnp.tanh(x.reshape(x.shape[0], 12) @ p['b']) @ p['c']

  rng = np.random.default_rng(0)
  shapes = {'a': (4, 12), 'scale': (6,), 'b': (12, 9), 'c': (9, 3)}
  params = {k: jnp.asarray(rng.normal(size=n)) for k, n in shapes.items()}
  x = jnp.asarray(rng.normal(size=(5, 4)))
  graph = jp.trace(net, params, x[:1], reductions='rescale')
  plan = plans.from_kept(graph, {'a.1': [0, 3, 4], 'b': [1, 2, 6]})
  small, fn = jp.shrink(graph, plan, params), jp.specialise(graph, plan)
  path = tmp_path / 'small.stablehlo'
  io.save_stablehlo(path, lambda x: fn(small, x), x[:1])
  exported = jax_export.deserialize(bytearray(path.read_bytes()))
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  assert '<9x3xf32>' not in str(exported.mlir_module())
  loaded = io.load_stablehlo(path)
  for n in (1, 5):
    np.testing.assert_allclose(
      loaded(x[:n]), plans.masked(graph, plan)(params, x[:n]), rtol=1e-5
    )


# --- Plain arrays ------------------------------------------------------------


def test_shrunk_params_come_back_with_their_plan(tmp_path):
  """Names, shapes, dtypes, bytes; read by the library of the format too."""
  fn = lambda p, x: jnp.tanh(x @ p['a']['w']) @ p['b']
  params = {
    'a': {'w': jnp.arange(12.0).reshape(2, 6)},
    'b': jnp.ones((6, 3), jnp.bfloat16),
    'mask': np.array([True, False]),
    'step': jnp.int32(7),
  }
  graph = jp.trace(fn, params, jnp.ones((1, 2)))
  plan = plans.from_widths(graph, {'a': 4})
  small = jp.shrink(graph, plan, params)
  path = tmp_path / 'small.safetensors'
  size = io.save_safetensors(path, small, {'plan': plans.to_json(plan)})
  assert path.stat().st_size == size
  found, metadata = io.load_safetensors(path, small)
  assert plans.from_json(metadata['plan']) == plan
  assert jax.tree.structure(found) == jax.tree.structure(small)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(small), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  flat, _ = io.load_safetensors(path)
  assert list(flat) == ['a/w', 'b', 'mask', 'step']
  library = pytest.importorskip('safetensors')
  with library.safe_open(path, 'flax') as file:
    assert file.metadata() == metadata
    np.testing.assert_array_equal(file.get_tensor('a/w'), small['a']['w'])
    assert file.get_tensor('b').dtype == jnp.bfloat16


def test_what_the_library_wrote_is_read(tmp_path):
  library = pytest.importorskip('safetensors.numpy')
  arrays = {'x': np.arange(3, dtype=np.int16), 'y': np.zeros((0, 2))}
  path = tmp_path / 'a.safetensors'
  library.save_file(arrays, path)
  found, metadata = io.load_safetensors(path)
  assert metadata == {}
  assert found.keys() == arrays.keys()
  np.testing.assert_array_equal(found['x'], arrays['x'])


def test_what_safetensors_cannot_hold_is_named(tmp_path):
  path = tmp_path / 'a.safetensors'
  save, load = io.save_safetensors, io.load_safetensors
  with pytest.raises(TypeError, match=r"Leaf 'k' has dtype key<fry>, which"):
    save(path, {'k': jax.random.key(0)})
  with pytest.raises(TypeError, match="texts, got 3 for 'epoch'"):
    save(path, {'a': jnp.ones(2)}, {'epoch': 3})
  with pytest.raises(ValueError, match=r'must end in \.safetensors, got'):
    save(tmp_path / 'a.bin', {'a': jnp.ones(2)})
  assert not path.exists()
  save(path, {'a': jnp.ones(2)})
  template = {'a': jnp.ones(3), 'b': jnp.ones(1)}
  message = r"'a' must be float32\[3\], got float32\[2\]; 'b' must .* got none"
  with pytest.raises(ValueError, match=message):
    load(path, template)
