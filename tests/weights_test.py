"""Conversion of foreign weights, against golden logits and on real data."""

import functools
import io
import json
import os
import pathlib
import re
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from marks import slow

from jaxprune import data, models, tree
from jaxprune.io import pretrained as weights
from jaxprune.io.pretrained import conversion
from jaxprune.models import mobilenet

KEY = jax.random.key(0)
GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'weights.npz'


def shapes(model, *shape, dtype=jnp.float32):
  return jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct(shape, dtype))


# Golden: small networks under foreign names, their logits by NumPy alone
# (golden/make_weights.py), so that a fresh checkout tests the conversion.

ROWS = (
  mobilenet.Row(3, 4, 4, True, nn.relu, 2),
  mobilenet.Row(5, 6, 4, False, nn.hard_swish, 1),
)
NETWORKS = {
  'resnet': (
    models.ResNet((3, 5, 8), (1, 1, 1), 4, stem='small'),
    weights.torch_resnet,
  ),
  'vgg': (
    models.VGG((1, 2), channels=(3, 4), hidden=(5,), num_classes=3),
    weights.torchvision_vgg,
  ),
  'mobilenet_v3': (
    models.MobileNet((ROWS,), 4, 6, 7, nn.hard_swish, 0.99, 1e-3, 3),
    weights.torchvision_mobilenet_v3,
  ),
  'mobilenet_v1': (
    models.MobileNetV1(
      1 / 16, 3, channels=(64, 96), blocks=(1, 2), strides=(1, 2)
    ),
    weights.keras_mobilenet_v1,
  ),
  'bert': (
    models.BERT(9, 4, 2, 2, 8, positions=6, num_classes=3),
    weights.hugging_face_bert,
  ),
}


@functools.cache
def golden(name):
  """Returns arrays under foreign names, an input of ours, and the logits."""
  file = np.load(GOLDEN)
  data, found = file['data'], {}
  for case, index in json.loads(str(file['index'])).items():
    for key, shape in index.items():
      size = int(np.prod(shape))
      found[case, key] = data[:size].reshape(shape)
      data = data[size:]
  assert data.size == 0
  arrays = {
    key: (x / np.float32(32)).astype(np.float32)
    for (case, key), x in found.items()
    if case == name and key != 'input'
  }
  x = found[name, 'input']
  if x.ndim == 4:
    x = (x / np.float32(32)).transpose(0, 2, 3, 1)
  return arrays, x, file[name]


def convert(name, arrays, like=None, **options):
  _, names = NETWORKS[name]
  like = shapes_of(name) if like is None else like
  keras = name == 'mobilenet_v1'
  convert = weights.from_keras if keras else weights.from_torch
  return convert(arrays, like, names, **options)


@functools.cache
def shapes_of(name):
  _, x, _ = golden(name)
  dtype = jnp.float32 if x.ndim == 4 else jnp.int32
  return shapes(NETWORKS[name][0], *x.shape, dtype=dtype)


@pytest.mark.parametrize(
  'name', [n if n in ('resnet', 'vgg') else slow(n) for n in NETWORKS]
)
def test_converted_weights_give_the_golden_logits(name):
  arrays, x, logits = golden(name)
  variables = convert(name, arrays)
  options = {}
  if name == 'bert':
    options['mask'] = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
  found = NETWORKS[name][0].apply(variables, x, **options)
  np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
    jnp.shape, shapes_of(name)
  )


@pytest.mark.parametrize('name', ['resnet', 'vgg', 'mobilenet_v3', 'bert'])
def test_going_to_torch_and_back_changes_no_bit(name):
  arrays, _, _ = golden(name)
  variables = convert(name, arrays)
  torch = weights.to_torch(variables, NETWORKS[name][1])
  renamed = {re.sub('gamma$', 'weight', key): x for key, x in arrays.items()}
  renamed = {re.sub('beta$', 'bias', key): x for key, x in renamed.items()}
  for key, x in torch.items():
    np.testing.assert_array_equal(x, renamed.pop(key))
  assert all(key.endswith('num_batches_tracked') for key in renamed)


# Names and shapes of whole checkpoints, as the other libraries print them.


@pytest.mark.parametrize(
  ('model', 'names', 'count', 'some'),
  [
    (
      models.resnet50(),
      weights.torch_resnet,
      267,
      {
        'layer1.0.downsample.0.weight': (256, 64, 1, 1),
        'layer4.2.conv3.weight': (2048, 512, 1, 1),
        'layer2.3.bn2.running_var': (128,),
        'fc.weight': (1000, 2048),
      },
    ),
    (
      models.vgg16(norm=False),
      weights.torchvision_vgg,
      32,
      {
        'features.28.weight': (512, 512, 3, 3),
        'classifier.0.weight': (4096, 25088),
        'classifier.6.bias': (1000,),
      },
    ),
    (
      models.vgg11(),
      weights.timm_vgg,
      54,
      {
        'features.25.weight': (512, 512, 3, 3),
        'features.26.running_mean': (512,),
        'pre_logits.fc1.weight': (4096, 512, 7, 7),
        'pre_logits.fc2.weight': (4096, 4096, 1, 1),
        'head.fc.weight': (1000, 4096),
      },
    ),
    (
      models.GoogLeNet(),
      weights.torchvision_googlenet,
      287,
      {
        'conv2.conv.weight': (64, 64, 1, 1),
        'inception4e.branch3.1.conv.weight': (128, 32, 3, 3),
        'inception5b.branch4.1.bn.bias': (128,),
      },
    ),
    (
      models.mobilenet_v2(),
      weights.torchvision_mobilenet_v2,
      262,
      {
        'features.1.conv.0.0.weight': (32, 1, 3, 3),
        'features.1.conv.1.weight': (16, 32, 1, 1),
        'features.17.conv.3.running_mean': (320,),
        'features.18.0.weight': (1280, 320, 1, 1),
        'classifier.1.weight': (1000, 1280),
      },
    ),
    (
      models.mobilenet_v3_large(),
      weights.torchvision_mobilenet_v3,
      266,
      {
        'features.1.block.1.0.weight': (16, 16, 1, 1),
        'features.4.block.2.fc1.weight': (24, 72, 1, 1),
        'features.4.block.3.0.weight': (40, 72, 1, 1),
        'features.16.0.weight': (960, 160, 1, 1),
      },
    ),
    (
      models.mobilenet_v1(tensorflow_padding=False),
      weights.timm_mobilenet_v1,
      137,
      {
        'conv_stem.weight': (32, 3, 3, 3),
        'blocks.3.5.conv_dw.weight': (512, 1, 3, 3),
        'blocks.4.1.bn2.weight': (1024,),
        'classifier.bias': (1000,),
      },
    ),
    (
      models.mobilenet_v2(),
      weights.timm_mobilenet_v2,
      262,
      {
        'blocks.0.0.conv_pw.weight': (16, 32, 1, 1),
        'blocks.6.0.conv_pwl.weight': (320, 960, 1, 1),
        'conv_head.weight': (1280, 320, 1, 1),
        'bn2.running_var': (1280,),
      },
    ),
    (
      models.mobilenet_v3_large(),
      weights.timm_mobilenet_v3,
      266,
      {
        'blocks.2.0.se.conv_reduce.weight': (24, 72, 1, 1),
        'blocks.4.1.conv_dw.weight': (672, 1, 3, 3),
        'blocks.5.2.bn3.bias': (160,),
        'blocks.6.0.conv.weight': (960, 160, 1, 1),
        'conv_head.weight': (1280, 960, 1, 1),
        'conv_head.bias': (1280,),
      },
    ),
    (
      models.mobilenet_v3_small(),
      weights.timm_mobilenet_v3,
      210,
      {
        'blocks.0.0.se.conv_expand.weight': (16, 8, 1, 1),
        'blocks.3.1.conv_pwl.weight': (48, 144, 1, 1),
        'blocks.5.0.conv.weight': (576, 96, 1, 1),
      },
    ),
    (
      models.BERT(depth=2),
      weights.hugging_face_bert,
      41,
      {
        'bert.embeddings.word_embeddings.weight': (30522, 768),
        'bert.encoder.layer.1.attention.output.LayerNorm.bias': (768,),
        'bert.encoder.layer.0.intermediate.dense.weight': (3072, 768),
      },
    ),
  ],
)
def test_names_and_shapes_are_those_of_the_library(model, names, count, some):
  if isinstance(model, models.BERT):
    like = shapes(model, 1, 8, dtype=jnp.int32)
  else:
    like = shapes(model, 1, 224, 224, 3)
  # One page of zeros serves every array.
  zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), like)
  torch = {name: x.shape for name, x in weights.to_torch(zeros, names).items()}
  assert len(torch) == count
  assert torch | some == torch


@functools.cache
def layers_of(build, *args):
  """Returns layer -> width of a network, as a function of names takes it."""
  params = shapes(build(*args), 1, 32, 32, 3)['params']
  leaves = tree.leaves(params)
  return {path.rpartition('/')[0]: x.shape[-1] for path, x in leaves.items()}


@pytest.mark.parametrize(
  ('build', 'names'),
  [
    slow(models.mobilenet_v1, weights.timm_mobilenet_v1),
    slow(models.mobilenet_v2, weights.timm_mobilenet_v2),
    (models.mobilenet_v3_small, weights.timm_mobilenet_v3),
    slow(models.mobilenet_v3_large, weights.timm_mobilenet_v3),
  ],
)
def test_names_of_timm_do_not_depend_on_widths(build, names):
  whole = layers_of(build)
  assert names(layers_of(build, 0.5)) == names(whole)
  shrunk = {layer: n - i for i, (layer, n) in enumerate(whole.items())}
  assert names(shrunk) == names(whole)
  equal = dict.fromkeys(whole, 8)
  assert names(equal) == names(whole)


# Blocks that are left out.

DROPPING = [
  (models.mobilenet_v1, weights.timm_mobilenet_v1),
  (models.mobilenet_v1, weights.keras_mobilenet_v1),
  (models.mobilenet_v2, weights.torchvision_mobilenet_v2),
  (models.mobilenet_v2, weights.timm_mobilenet_v2),
  (models.mobilenet_v2, weights.keras_mobilenet_v2),
  (models.mobilenet_v3_small, weights.torchvision_mobilenet_v3),
  (models.mobilenet_v3_large, weights.torchvision_mobilenet_v3),
  (models.mobilenet_v3_small, weights.timm_mobilenet_v3),
  (models.mobilenet_v3_large, weights.keras_mobilenet_v3),
  (models.resnet50, weights.torch_resnet),
  (models.resnet20, weights.cifar_resnet),
]


def without(block, tree):
  """Returns variables, or layers by path, without those of a block."""
  if not isinstance(tree, dict):
    return tree
  rest = {k: v for k, v in tree.items() if k.partition('/')[0] != block}
  return {k: without(block, v) for k, v in rest.items()}


def ends_a_stage(block, layers):
  """Returns whether no block of its stage comes after it."""
  stage, number = (int(n) for n in re.findall(r'\d+', block))
  after = f'stage{stage}_block{number + 1}/'
  return not any(layer.startswith(after) for layer in layers)


@pytest.mark.parametrize(('build', 'names'), DROPPING)
def test_a_block_that_is_left_out_leaves_its_names_free(build, names):
  layers = layers_of(build)
  whole, blocks = names(layers), build().bypassable
  blocks = [block for block in blocks if not ends_a_stage(block, layers)]
  assert blocks
  for block in blocks:
    rest = without(block, layers)
    found = names(rest)
    assert {k: found[k] for k in rest} == {k: whole[k] for k in rest}


@pytest.mark.parametrize(
  ('names', 'block', 'theirs'),
  [
    ('torchvision_mobilenet_v2', 'stage4_block2', r'features\.8\..*'),
    ('timm_mobilenet_v2', 'stage6_block3', r'blocks\.5\.2\..*'),
  ],
)
def test_a_whole_checkpoint_fills_a_network_without_a_block(
  names, block, theirs
):
  variables, names = random_v2(), getattr(weights, names)
  arrays, short = weights.to_torch(variables, names), without(block, variables)
  with pytest.raises(ValueError, match=f'left over: {theirs[:8]}'):
    weights.from_torch(arrays, short, names)
  found = weights.from_torch(arrays, short, names, ignore=(theirs,))
  jax.tree.map(np.testing.assert_array_equal, found, short)


def test_a_stage_without_its_last_block_refuses_the_whole_checkpoint():
  names, variables = weights.torchvision_mobilenet_v2, random_v2()
  arrays = weights.to_torch(variables, names)
  for block in ('stage2_block2', 'stage4_block4', 'stage6_block3'):
    short = without(block, variables)
    with pytest.raises(ValueError, match=r'missing: .*features\.17\.0\.weight'):
      weights.from_torch(arrays, short, names, ignore=('features.*',))


@functools.cache
def random_v2():
  """Returns random variables of a narrow MobileNet V2."""
  rng, like = (
    np.random.default_rng(0),
    shapes(models.mobilenet_v2(0.25), 1, 32, 32, 3),
  )
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), like)


def test_a_v3_of_another_table_has_no_names_of_timm():
  layers = layers_of(lambda: NETWORKS['mobilenet_v3'][0])
  with pytest.raises(ValueError, match=r'4 stages .* or 5 \(large\), got 1'):
    weights.timm_mobilenet_v3(layers)


def keras_names(model, names):
  """Returns what Keras calls every array of a network."""
  leaves = tree.leaves(shapes(model, 1, 224, 224, 3))
  theirs = names(conversion._layers(leaves))
  return {
    conversion._keras_leaf(theirs[layer].name, layer, kind)
    for layer, kind in map(conversion._split, leaves)
  }


def test_keras_names_of_mobilenet_v2():
  assert keras_names(models.mobilenet_v2(), weights.keras_mobilenet_v2) >= {
    'Conv1/kernel',
    'bn_Conv1/moving_variance',
    'expanded_conv_depthwise/depthwise_kernel',
    'expanded_conv_project_BN/gamma',
    'block_16_expand/kernel',
    'Conv_1_bn/beta',
    'predictions/kernel',
  }


def test_keras_names_of_mobilenet_v3():
  names = keras_names(models.mobilenet_v3_small(), weights.keras_mobilenet_v3)
  assert names >= {
    'conv/kernel',
    'conv_bn/moving_variance',
    'expanded_conv_depthwise/depthwise_kernel',
    'expanded_conv_squeeze_excite_conv/bias',
    'expanded_conv_1_expand_bn/gamma',
    'expanded_conv_10_squeeze_excite_conv_1/kernel',
    'expanded_conv_10_project/kernel',
    'conv_1_bn/beta',
    'conv_2/bias',
    'logits/kernel',
  }


def test_a_v3_of_keras_becomes_ours():
  like = shapes(models.mobilenet_v3_small(0.25, num_classes=3), 1, 32, 32, 3)
  leaves = tree.leaves(like)
  place = lambda path: path.split('/', 1)[1].rpartition('/')
  names = weights.keras_mobilenet_v3({place(path)[0]: 0 for path in leaves})
  kinds = {'scale': 'gamma', 'mean': 'moving_mean', 'var': 'moving_variance'}
  rng = np.random.default_rng(0)
  ours = {p: rng.normal(size=x.shape).astype('f4') for p, x in leaves.items()}
  theirs = {}
  for path, array in ours.items():
    layer, _, kind = place(path)
    kind = kinds.get(kind, kind)
    if layer.endswith('norm'):
      kind = {'bias': 'beta'}.get(kind, kind)
    elif layer.endswith('depthwise'):  # Theirs is height, width, channels, 1.
      kind, array = 'depthwise_kernel', np.moveaxis(array, 2, 3)
    elif array.ndim == 2:  # Theirs is a convolution.
      array = array[None, None]
    theirs[f'{names[layer].name}/{kind}'] = array
  found = weights.from_keras(theirs, like, weights.keras_mobilenet_v3)
  for path, array in tree.leaves(found).items():
    np.testing.assert_array_equal(array, ours[path])


# Bad input.


def test_every_name_that_does_not_fit_is_listed():
  arrays = dict(golden('resnet')[0])
  del arrays['layer2.0.bn1.running_var'], arrays['fc.bias']
  arrays['aux.weight'] = np.zeros(3, np.float32)
  arrays['conv1.weight'] = np.zeros((3, 1, 3, 3), np.float32)
  arrays['layer1.0.conv1.weight'] = np.zeros((3, 3), np.float32)
  with pytest.raises(ValueError, match='do not fit') as error:
    convert('resnet', arrays)
  for part in (
    'missing: ',
    'layer2.0.bn1.running_var (for batch_stats/stage2_block1/norm1/var)',
    'fc.bias (for params/head/bias)',
    'left over: aux.weight.',
    'of another shape: ',
    'conv1.weight (3, 1, 3, 3) for params/stem/kernel (3, 3, 3, 3)',
    'layer1.0.conv1.weight (3, 3) for params/stage1_block1/conv1/kernel',
  ):
    assert part in str(error.value)


def test_names_of_another_network_are_missing():
  like = shapes(models.LeNet5(), 1, 32, 32, 3)
  with pytest.raises(ValueError, match=r'conv1/kernel \(no name is known\)'):
    weights.from_torch({}, like, weights.torch_resnet)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), like)
  with pytest.raises(ValueError, match=r'No name is known for params/conv1/b'):
    weights.to_torch(zeros, weights.torch_resnet)


def test_ignore_and_keep_say_what_may_differ():
  arrays = {f'module.{name}': x for name, x in golden('resnet')[0].items()}
  arrays['aux.weight'] = np.zeros(3, np.float32)
  del arrays['module.fc.weight'], arrays['module.fc.bias']
  like = jax.tree.map(
    lambda x: np.full(x.shape, 7.0, x.dtype), shapes_of('resnet')
  )
  rules = {'ignore': ('aux.*',), 'keep': ('params/head/.*',)}
  found = convert('resnet', arrays, like, **rules)
  assert np.all(found['params']['head']['kernel'] == 7)
  assert np.any(found['params']['stem']['kernel'] != 7)
  with pytest.raises(TypeError, match="matches 'params/head/bias', of which"):
    convert('resnet', arrays, **rules)
  with pytest.raises(ValueError, match=r"No leaf matches 'heads\.\*'"):
    convert('resnet', arrays, like, ignore=('aux.*',), keep=('heads.*',))
  with pytest.raises(ValueError, match=r"`ignore` '\(' is no regular express"):
    convert('resnet', arrays, ignore=('(',))


# Names and arrays as other tools leave them.


def assert_golden(found):
  """Asserts that these are the variables of the golden ResNet."""
  wanted = convert('resnet', golden('resnet')[0])
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
  'wrap',
  [
    '{}.{}',
    'module.{}.{}',
    '_orig_mod.{}.{}',
    'module.module.{}.{}',
    'module._orig_mod.{}.{}',
    'model.{}.{}',
    'backbone.{}.{}',
    'model.backbone.module.{}.{}',
    'student.{}.module.{}',  # A layer of its own is wrapped.
    '{}._fsdp_wrapped_module.{}',
    'anything.at.all.{}.{}',
  ],
)
def test_a_prefix_of_all_names_is_understood(wrap):
  arrays = {
    wrap.format(*name.split('.', 1)): x
    for name, x in golden('resnet')[0].items()
  }
  assert_golden(convert('resnet', arrays))
  # What is not of the network is still left over, and ignored by its name.
  arrays['neck.weight'] = np.zeros(2, np.float32)
  with pytest.raises(ValueError, match=r'left over: neck\.weight\. '):
    convert('resnet', arrays)
  assert_golden(convert('resnet', arrays, ignore=(r'neck\..*',)))


def test_a_prefix_need_not_be_written_in_ignore():
  arrays = {f'model.{name}': x for name, x in golden('resnet')[0].items()}
  arrays['model.aux.weight'] = np.zeros(2, np.float32)
  for rule in ('aux.*', 'model.aux.*'):
    assert_golden(convert('resnet', arrays, ignore=(rule,)))
  with pytest.raises(
    ValueError, match=r"No name matches 'fc\.weights'"
  ) as error:
    convert('resnet', arrays, ignore=('aux.*', 'fc.weights'))
  assert 'the paths are: fc.weight, ' in str(error.value)  # The nearest first.
  assert len(str(error.value)) < 700


@pytest.mark.parametrize('first', ['', 'model.', 'teacher.'])
def test_a_network_under_two_prefixes_is_refused_by_name(first):
  arrays, _, _ = golden('resnet')
  twice = {f'{first}{name}': x for name, x in arrays.items()}
  twice |= {f'ema.{name}': 2 * x for name, x in arrays.items()}
  with pytest.raises(ValueError, match=rf"2 times, under .*{first}'") as error:
    convert('resnet', twice)
  assert "'ema.'" in str(error.value)
  assert_golden(convert('resnet', twice, ignore=(r'ema\..*',)))


def test_a_bare_body_lacks_the_first_layer_of_its_names():
  arrays, _, _ = golden('bert')
  like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes_of('bert'))
  body = {
    name.removeprefix('bert.'): x
    for name, x in arrays.items()
    if name.startswith('bert.')
  }
  found = convert('bert', body, like, keep=('params/head/.*',))
  wanted = convert('bert', arrays)
  found['params']['head'] = wanted['params']['head']
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_many_names_of_one_cause_are_one_line():
  arrays = golden('resnet')[0]
  more = {f'aux.block{i}.bias': np.zeros(1, np.float32) for i in range(900)}
  with pytest.raises(ValueError, match='left over') as error:
    convert('resnet', arrays | more)
  assert 'left over: aux.* (900, such as aux.block0.bias). ' in str(error.value)
  strange = {f'{i}': np.zeros(1, np.float32) for i in range(900)}
  with pytest.raises(
    ValueError, match=r'900 names, such as 0, 1, 2\.'
  ) as error:
    convert('resnet', strange)
  assert 'missing: layer1.0.* (10, such as layer1.0.bn1' in str(error.value)
  assert len(str(error.value)) < 900


@pytest.mark.parametrize(
  ('name', 'layer', 'path'),
  [
    ('resnet', 'fc.weight', 'params/head/kernel'),
    ('resnet', 'layer2.0.conv1.weight', 'params/stage2_block1/conv1/kernel'),
    ('mobilenet_v1', 'conv_preds/kernel:0', 'params/head/kernel'),
  ],
)
def test_a_transposed_matrix_is_named_as_such(name, layer, path):
  """In our layout its shape equals that of the leaf, and they seem to fit."""
  arrays = dict(golden(name)[0])
  theirs = arrays[layer].shape
  arrays[layer] = arrays[layer].T
  turned = arrays[layer].shape
  name_there = layer.removesuffix(':0')
  line = (
    f'transposed: {name_there} {turned}, not {theirs}, for {path}. Give a trans'
  )
  with pytest.raises(ValueError, match=re.escape(line)):
    convert(name, arrays)


def test_weights_pruned_in_torch_are_their_product():
  arrays = dict(golden('resnet')[0])
  rng, expected = np.random.default_rng(0), dict(arrays)
  for name in ('layer1.0.conv1.weight', 'fc.weight', 'fc.bias'):
    whole = arrays.pop(name)
    mask = rng.integers(0, 2, whole.shape).astype(np.float32)
    expected[name] = whole * mask
    arrays[f'{name}_orig'], arrays[f'{name}_mask'] = whole, mask
  found = convert('resnet', {f'module.{k}': x for k, x in arrays.items()})
  wanted = convert('resnet', expected)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  # A pruned infinity is pruned, not NaN.
  wild = arrays | {'fc.bias_orig': np.where(mask, whole, np.inf)}
  wild['fc.bias_orig'] = wild['fc.bias_orig'].astype(np.float32)
  found = convert('resnet', wild)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'fc.bias_mask': np.full(4, 0.5)}, 'fc.bias_mask must hold 0 and 1 in'),
    ({'fc.bias_mask': np.ones(3)}, r'in the shape \(4,\) of fc.bias_orig, got'),
    ({'fc.bias_mask': np.ones(4), 'fc.bias': np.ones(4)}, 'fc.bias and also'),
    ({}, r'left over: fc.bias_orig. Some names .* remove_weight_norm'),
    (
      {'fc.parametrizations.bias.original': np.ones(4)},
      r'remove_parametrizations, remove_weight_norm or remove_spectral_norm',
    ),
  ],
)
def test_other_reparametrizations_are_refused(given, message):
  arrays = dict(golden('resnet')[0])
  arrays['fc.bias_orig'] = arrays.pop('fc.bias')
  with pytest.raises(ValueError, match=message):
    convert('resnet', arrays | given)


def test_float32_becomes_bfloat16_by_choice():
  arrays, _, _ = golden('resnet')
  arrays = {name: x + np.float32(1 / 3) for name, x in arrays.items()}
  half = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes_of('resnet')
  )
  with pytest.raises(
    ValueError, match=r'rounded by the dtype: .* allow_rounding=T'
  ):
    convert('resnet', arrays, half)
  found = convert('resnet', arrays, half, allow_rounding=True)
  wanted = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), convert('resnet', arrays)
  )
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  arrays['fc.bias'] = np.full(4, 1e39)  # Beyond what bfloat16 holds.
  with pytest.raises(
    ValueError, match=r'beyond the dtype: fc\.bias float64 for p'
  ):
    convert('resnet', arrays, half, allow_rounding=True)


def test_integers_are_no_weights_and_all_are_listed():
  given = {'fc.bias': np.zeros(4, np.int32), 'bn1.bias': np.zeros(3, bool)}
  arrays = golden('resnet')[0] | given
  del arrays['fc.weight']
  with pytest.raises(TypeError, match='no floats: ') as error:
    convert('resnet', arrays)
  for part in ('fc.bias int32', 'bn1.bias bool', 'fc.weight (for params/head'):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ('name', 'first', 'second'),
  [
    ('resnet', 'conv1.weight', 'module.conv1.weight'),
    ('resnet', 'bn1.weight', 'bn1.gamma'),
    ('mobilenet_v1', 'conv1/kernel:0', 'conv1/kernel'),
  ],
)
def test_two_names_of_one_layer_are_refused(name, first, second):
  arrays = dict(golden(name)[0])
  arrays[second] = arrays[first]
  with pytest.raises(ValueError, match=f'{first} and {second}'):
    convert(name, arrays)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (
      np.float64(1e300),
      'rounded by the dtype: fc.bias float64 for params/head',
    ),
    (np.float64(0.1), 'rounded by the dtype: fc.bias float64'),
    (np.float32(np.nan), 'not finite: fc.bias'),
    (np.float16(np.inf), 'not finite: fc.bias'),
  ],
)
def test_no_value_is_rounded_or_not_finite(value, message):
  arrays = golden('resnet')[0] | {'fc.bias': np.full(4, value)}
  with pytest.raises(ValueError, match=message):
    convert('resnet', arrays)


def test_a_wider_dtype_without_more_bits_is_read():
  arrays = golden('resnet')[0] | {'fc.bias': np.full(4, np.float64(0.25))}
  found = convert('resnet', arrays)['params']['head']['bias']
  np.testing.assert_array_equal(found, np.full(4, np.float32(0.25)))


# Files.


def safetensors(header, body):
  header = json.dumps(header).encode()
  return struct.pack('<Q', len(header)) + header + body


def test_safetensors_are_read_by_their_definition(tmp_path):
  path = tmp_path / 'a.safetensors'
  body = np.float32([1, 2, 3]).tobytes() + b'\x80\x3f\x00\xc0'
  header = {
    '__metadata__': {'format': 'pt'},
    'a': {'dtype': 'F32', 'shape': [3, 1], 'data_offsets': [0, 12]},
    'b': {'dtype': 'BF16', 'shape': [2], 'data_offsets': [12, 16]},
    'c': {'dtype': 'F64', 'shape': [0, 4], 'data_offsets': [16, 16]},
  }
  path.write_bytes(safetensors(header, body))
  found = weights.read(path)
  np.testing.assert_array_equal(found['a'], [[1], [2], [3]])
  assert found['b'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(found['b'].astype(np.float32), [1, -2])
  assert found['c'].shape == (0, 4)


def test_what_the_library_of_safetensors_writes_is_read(tmp_path):
  library = pytest.importorskip('safetensors.numpy')
  arrays, _, _ = golden('bert')
  library.save_file(arrays, tmp_path / 'a.safetensors')
  found = weights.read(tmp_path / 'a.safetensors')
  assert found.keys() == arrays.keys()
  for name, x in arrays.items():
    np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize('ending', ['.npz', '.NPZ', '.Npz'])
def test_npz_is_read(tmp_path, ending):
  with (tmp_path / f'a{ending}').open('wb') as file:
    np.savez(file, **{'conv1.weight': np.arange(3.0)})
  found = weights.read(tmp_path / f'a{ending}')
  np.testing.assert_array_equal(found['conv1.weight'], [0, 1, 2])


@pytest.mark.parametrize('ending', ['.SAFETENSORS', '.Safetensors'])
def test_safetensors_are_read_in_either_case(tmp_path, ending):
  path = tmp_path / f'a{ending}'
  path.write_bytes(safetensors({'a': ENTRY}, np.float32([1, 2, 3]).tobytes()))
  np.testing.assert_array_equal(weights.read(path)['a'], [1, 2, 3])


@pytest.mark.parametrize(
  ('names', 'remedy'),
  [
    (('a.pt', 'a.pth', 'a.PTH', 'a.bin', 'a.ckpt', 'a.pth.tar'), 'torch.load('),
    (
      ('a.h5', 'a.hdf5', 'a.keras', 'a.weights.h5', 'a.H5'),
      'keras.saving.load',
    ),
    (('a.msgpack', 'flax_model.MSGPACK'), 'flax.serialization.msgpack_restore'),
    (('a.npy',), 'A .npy is a single array'),
    (('model.safetensors.index.json',), 'list of the files'),
    (('a', 'a.zip', 'a.onnx', 'npz'), 'numpy.savez(path, **arrays)'),
  ],
)
def test_another_kind_of_file_says_how_to_convert_it(tmp_path, names, remedy):
  for name in names:
    with pytest.raises(ValueError, match=re.escape(remedy)) as error:
      weights.read(tmp_path / name)
    text = str(error.value)
    assert f'{str(tmp_path / name)!r} must end in .npz or .safetensors' in text
    assert '\n' not in text


ENTRY = {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 12]}


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.pth', b'', r'must end in \.npz or \.safetensors'),
    ('a.npz', b'no zip', 'is no whole .npz file'),
    ('a.safetensors', b'', 'is no whole .safetensors file'),
    ('a.safetensors', b'\xff' * 8 + b'{}', 'is no whole .safetensors file'),
    (
      'a.safetensors',
      struct.pack('<Q', 3) + b'{"a',
      'has a damaged header',
    ),
    (
      'a.safetensors',
      safetensors({'a': ENTRY}, b'1234'),
      "'a' in .* must have 12 bytes, its range is 0 to 12 of 4",
    ),
    (
      'a.safetensors',
      safetensors({'a': ENTRY | {'dtype': 'F4'}}, b'1' * 12),
      "has the dtype 'F4'; known are BOOL, U8",
    ),
  ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    weights.read(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ('header', 'body', 'message'),
  [
    ([], b'', 'it is no object'),
    (None, b'', 'it is no object'),
    ({'a': None}, b'', "'a' must have a dtype, a shape and two"),
    ({'a': {'dtype': 'F32'}}, b'', "got {'dtype': 'F32'}"),
    ({'a': {**ENTRY, 'dtype': ['F32']}}, b'1' * 12, "'a' must have a dtype"),
    ({'a': {**ENTRY, 'shape': 3}}, b'1' * 12, "'a' must have a dtype"),
    ({'a': {**ENTRY, 'shape': [-1, -3]}}, b'1' * 12, "'a' must have a dtype"),
    ({'a': {**ENTRY, 'shape': [3.0]}}, b'1' * 12, "'a' must have a dtype"),
    ({'a': {**ENTRY, 'data_offsets': [0]}}, b'1' * 12, 'two data_offsets'),
    ({'a': {**ENTRY, 'data_offsets': [12, 0]}}, b'1' * 12, 'is 12 to 0 of 12'),
    ({'a': ENTRY, 'b': ENTRY}, b'1' * 12, 'ends at byte 12 .* begins at 0'),
    ({'a': ENTRY}, b'1' * 13, 'end at byte 12 of 13'),
    ({}, b'1', 'end at byte 0 of 1'),
  ],
)
def test_a_damaged_header_is_named(tmp_path, header, body, message):
  path = tmp_path / 'a.safetensors'
  path.write_bytes(safetensors(header, body))
  with pytest.raises(ValueError, match=message) as error:
    weights.read(path)
  assert str(path) in str(error.value)


def test_a_header_without_end_is_named(tmp_path):
  path, header = tmp_path / 'a.safetensors', b'[' * 100_000
  path.write_bytes(struct.pack('<Q', len(header)) + header)
  with pytest.raises(ValueError, match=r'a\.safetensors.* damaged header'):
    weights.read(path)


def damaged_npz(kind):
  """Returns the bytes of a file that numpy.load does not read whole."""
  file, array = io.BytesIO(), np.arange(999.0) % 7
  if kind == 'text':
    with zipfile.ZipFile(file, 'w') as members:
      members.writestr('a.txt', 'no array')
  elif kind == 'one':
    np.save(file, array)
  else:
    save = np.savez_compressed if kind == 'zlib' else np.savez
    save(file, a=array)
  raw = bytearray(file.getvalue())
  if kind == 'zlib':
    raw[60:90] = b'\xff' * 30
  elif kind == 'token':
    place = raw.index(b'{')
    raw[place : place + 10] = b"{'a':((((("
  return bytes(raw)


@pytest.mark.parametrize('kind', ['zlib', 'token', 'text', 'one'])
def test_a_damaged_npz_is_named(tmp_path, kind):
  path = tmp_path / 'a.npz'
  path.write_bytes(damaged_npz(kind))
  with pytest.raises(ValueError, match=r'a\.npz.* is no whole \.npz file'):
    weights.read(path)


def test_a_missing_file_is_named(tmp_path):
  for name in ('a.npz', 'a.safetensors'):
    with pytest.raises(FileNotFoundError, match='a'):
      weights.read(tmp_path / name)


CONFIG = {
  'model_type': 'bert',
  'vocab_size': 9,
  'hidden_size': 4,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 8,
  'max_position_embeddings': 6,
  'type_vocab_size': 2,
  'id2label': {'0': 'no', '1': 'maybe', '2': 'yes'},
}


def test_a_config_of_bert_builds_its_network():
  model = models.BERT(**weights.bert_options(CONFIG))
  assert model == NETWORKS['bert'][0]


def test_a_config_without_labels_counts_its_classes():
  classes = lambda **given: weights.bert_options(CONFIG | given)['num_classes']
  assert classes(id2label=None) == 2
  assert classes(id2label=None, num_labels=5) == 5


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'model_type': 'roberta'}, "must have model_type 'bert', got 'roberta'"),
    ({'hidden_act': 'relu'}, "must have hidden_act 'gelu', got 'relu'"),
  ],
)
def test_another_config_is_refused(config, message):
  with pytest.raises(ValueError, match=message):
    weights.bert_options(CONFIG | config)


def test_a_config_without_a_key_is_refused():
  config = {k: v for k, v in CONFIG.items() if not k.startswith('vocab')}
  with pytest.raises(ValueError, match='of a BERT lacks vocab_size'):
    weights.bert_options(config)


# Real weights and data: JAXPRUNE_DATA names the folder that holds `pretrained`,
# `tfds` and `tfds_lossless`.

DATA = os.environ.get('JAXPRUNE_DATA', '')
NO_DATA = not os.path.isdir(os.path.join(DATA, 'pretrained'))


def needs_data(test):
  """Marks a test that reads the folder, in which other libraries warn."""
  why = 'JAXPRUNE_DATA names no folder with pretrained/'
  test = pytest.mark.skipif(NO_DATA, reason=why)(pytest.mark.data(test))
  return pytest.mark.filterwarnings('ignore')(test)


def accuracy(model, variables, images, labels, batch):
  """Returns top-1 and top-5 in percent."""
  run = jax.jit(model.apply)
  pairs = [
    (run(variables, images[i : i + batch]), labels[i : i + batch])
    for i in range(0, len(images), batch)
  ]
  logits = np.concatenate([np.asarray(x) for x, _ in pairs])
  order = np.argsort(-logits, axis=1)[:, :5] == labels[:, None]
  return 100 * order[:, 0].mean(), 100 * order.any(1).mean()


@functools.cache
def cifar10(folder):
  """Returns the test images of a folder, normalised, and their labels."""
  test = data.load('cifar10', 'test', os.path.join(DATA, folder))
  x = test.images / np.float32(255)
  mean, std = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
  x = (x - mean[None, None, None]) / std[None, None, None]
  return x, test.labels


def pretrained(model, file, convert, names, side):
  arrays = weights.read(os.path.join(DATA, 'pretrained', file))
  return convert(arrays, shapes(model, 1, side, side, 3), names)


def resnet_accuracy(name, images, labels):
  model, names = getattr(models, name)(), weights.cifar_resnet
  file = f'{name}_cifar10.npz'
  variables = pretrained(model, file, weights.from_torch, names, 32)
  top1, _ = accuracy(model, variables, images, labels, 250)
  print(f'{name}: {top1:.2f} % of {len(labels):,}')
  return top1


@needs_data
@pytest.mark.parametrize(
  ('name', 'top1'),
  [
    ('resnet20', 91.5),
    ('resnet32', 92.8),
    ('resnet44', 93.3),
    ('resnet56', 92.6),
  ],
)
def test_the_pretrained_resnets_reach_their_accuracy(name, top1):
  # The official pixels of 1,000 images; one of them more or less.
  found = resnet_accuracy(name, *cifar10('tfds_lossless'))
  assert abs(found - top1) < 0.15


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'top1'),
  [
    ('resnet20', 81.03),
    ('resnet32', 82.56),
    ('resnet44', 82.67),
    ('resnet56', 83.2),
  ],
)
def test_the_pretrained_resnets_on_all_jpeg_images(name, top1):
  # All 10,000; the pixels of a JPEG depend on its decoder, here Pillow.
  found = resnet_accuracy(name, *cifar10('tfds'))
  assert abs(found - top1) < 0.3


@needs_data
def test_the_pretrained_mobilenet_reaches_its_accuracy():
  photos = data.load('imagenet_sample', 'validation', DATA)
  x, labels = photos.images / np.float32(127.5) - 1, photos.labels
  model = models.mobilenet_v1(0.25)
  file = 'mobilenet_v1_025_224_imagenet.npz'
  names = weights.keras_mobilenet_v1
  variables = pretrained(model, file, weights.from_keras, names, 224)
  assert tree.size(variables) == 475_544
  top1, top5 = accuracy(model, variables, x, labels, 50)
  print(f'MobileNet V1 x 0.25: {top1:.1f} %, among five {top5:.1f} %')
  assert abs(top1 - 57.8) < 0.25
  assert abs(top5 - 80.9) < 0.25
