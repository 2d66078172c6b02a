"""What other libraries call the layers of our networks."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxprune.checks import kinds


class Named(NamedTuple):
  """A layer under the name that another library has for it."""

  name: str
  flattened: int = 0  # Channels of the feature map that it reads flat, or 0.
  side: int = 0  # Side of its kernel if it is a convolution there, dense here.


# Our layer -> number of its channels, in; our layer -> their layer, out.
Names = Callable[[Mapping[str, int]], Mapping[str, Named]]


# Names of layers in PyTorch.


@kinds.checked
def torch_resnet(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of torchvision's and timm's ResNets."""
  return _resnet(layers, 'fc', 'downsample')


@kinds.checked
def cifar_resnet(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of the usual CIFAR ResNets: ``linear`` and ``shortcut``."""
  return _resnet(layers, 'linear', 'shortcut')


@kinds.checked
def torchvision_vgg(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of torchvision's VGGs, with and without norms."""
  features, flat = _vgg_features(layers)
  hidden = [layer for layer in layers if layer.startswith('hidden')]
  dense = [*sorted(hidden), 'head']
  theirs = [Named(f'classifier.{3 * i}') for i in range(len(dense))]
  theirs[0] = theirs[0]._replace(flattened=flat)
  return features | dict(zip(dense, theirs, strict=True))


@kinds.checked
def timm_vgg(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of timm's VGGs, whose hidden layers are convolutions."""
  features, flat = _vgg_features(layers)
  hidden = {
    'hidden1': Named('pre_logits.fc1', flat, 7),
    'hidden2': Named('pre_logits.fc2', 0, 1),
  }
  return features | hidden | {'head': Named('head.fc')}


@kinds.checked
def torchvision_googlenet(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of torchvision's GoogLeNet; its other heads are ``aux.*``.

  Its pretrained weights imply ``transform_input``: they are for images scaled
  to -1 to 1, not normalised by the statistics of ImageNet.
  """
  branches = {
    'branch1': 'branch1',
    'branch2_reduce': 'branch2.0',
    'branch2': 'branch2.1',
    'branch3_reduce': 'branch3.0',
    'branch3': 'branch3.1',
    'branch4': 'branch4.1',
  }
  theirs = {'head': Named('fc')}
  for layer in layers:
    base = layer.removesuffix('_norm')
    unit = 'bn' if layer.endswith('_norm') else 'conv'
    block, _, branch = base.rpartition('/')
    if branch in branches:
      theirs[layer] = Named(f'{block}.{branches[branch]}.{unit}')
    elif base.startswith('stem'):
      theirs[layer] = Named(f'{base.replace("stem", "conv")}.{unit}')
  return theirs


@kinds.checked
def torchvision_mobilenet_v2(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of torchvision's MobileNet V2."""
  theirs = _unit('stem', 'features.0.0', 'features.0.1')
  i = 0
  for i, block in _numbered(layers):
    prefix, units = f'features.{i}.conv', ['expand', 'depthwise']
    units = [unit for unit in units if f'{block}/{unit}' in layers]
    for j, unit in enumerate(units):
      theirs |= _unit(f'{block}/{unit}', f'{prefix}.{j}.0', f'{prefix}.{j}.1')
    j = len(units)
    theirs |= _unit(f'{block}/project', f'{prefix}.{j}', f'{prefix}.{j + 1}')
  last = f'features.{i + 1}'
  theirs |= _unit('last', f'{last}.0', f'{last}.1')
  return theirs | {'head': Named('classifier.1')}


@kinds.checked
def torchvision_mobilenet_v3(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of torchvision's MobileNet V3, small and large."""
  theirs = _unit('stem', 'features.0.0', 'features.0.1')
  i = 0
  for i, block in _numbered(layers):
    units = ['expand', 'depthwise', 'squeeze', 'project']
    units = [unit for unit in units if f'{block}/{unit}' in layers]
    for j, unit in enumerate(units):
      prefix = f'features.{i}.block.{j}'
      if unit == 'squeeze':
        theirs[f'{block}/squeeze'] = Named(f'{prefix}.fc1', side=1)
        theirs[f'{block}/excite'] = Named(f'{prefix}.fc2', side=1)
      else:
        theirs |= _unit(f'{block}/{unit}', f'{prefix}.0', f'{prefix}.1')
  last = f'features.{i + 1}'
  theirs |= _unit('last', f'{last}.0', f'{last}.1')
  theirs['hidden'] = Named('classifier.0')
  return theirs | {'head': Named('classifier.3')}


@kinds.checked
def timm_mobilenet_v1(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of timm's MobileNet V1; its sides are padded evenly."""
  theirs = _unit('stem', 'conv_stem', 'bn1') | {'head': Named('classifier')}
  for block, prefix in _timm_blocks(layers).items():
    theirs |= _unit(f'{block}/depthwise', f'{prefix}.conv_dw', f'{prefix}.bn1')
    theirs |= _unit(f'{block}/pointwise', f'{prefix}.conv_pw', f'{prefix}.bn2')
  return theirs


@kinds.checked
def timm_mobilenet_v2(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of timm's MobileNet V2."""
  theirs = _timm_inverted(layers, _timm_blocks(layers))
  return theirs | _unit('last', 'conv_head', 'bn2')


@kinds.checked
def timm_mobilenet_v3(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of timm's MobileNet V3, small and large.

  There a stage has one published width; one of ours is two of theirs.
  """
  stages = max(
    (_stage_and_block(name)[0] for name in _blocks(layers)), default=0
  )
  if stages not in _TIMM_V3:
    raise ValueError(
      f'MobileNet V3 has 4 stages (small) or 5 (large), got {stages}.'
    )
  blocks = _timm_blocks(layers, _TIMM_V3[stages])
  theirs = _timm_inverted(layers, blocks)
  prefix = f'blocks.{stages + 1}.0'
  theirs |= _unit('last', f'{prefix}.conv', f'{prefix}.bn1')
  return theirs | {'hidden': Named('conv_head', side=1)}


@kinds.checked
def hugging_face_bert(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of Hugging Face's ``BertForSequenceClassification``.

  A checkpoint of the pretraining has ``cls.*`` for the heads we lack, and lacks
  ours: ``ignore=('cls.*',), keep=('params/head/.*',)``.
  """
  theirs = {
    'words': 'bert.embeddings.word_embeddings',
    'positions': 'bert.embeddings.position_embeddings',
    'types': 'bert.embeddings.token_type_embeddings',
    'embedding_norm': 'bert.embeddings.LayerNorm',
    'pooler': 'bert.pooler.dense',
    'head': 'classifier',
  }
  units = {
    'query': 'attention.self.query',
    'key': 'attention.self.key',
    'value': 'attention.self.value',
    'attention_output': 'attention.output.dense',
    'attention_norm': 'attention.output.LayerNorm',
    'intermediate': 'intermediate.dense',
    'output': 'output.dense',
    'output_norm': 'output.LayerNorm',
  }
  for layer in layers:
    match = re.fullmatch(r'layer(\d+)/(\w+)', layer)
    if match and match[2] in units:
      prefix = f'bert.encoder.layer.{int(match[1]) - 1}'
      theirs[layer] = f'{prefix}.{units[match[2]]}'
  return {layer: Named(name) for layer, name in theirs.items()}


# Names of layers in Keras.


@kinds.checked
def keras_mobilenet_v1(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of Keras' MobileNet V1."""
  theirs = _unit('stem', 'conv1', 'conv1_bn')
  for i, block in _numbered(layers):
    for unit, their in (('depthwise', 'dw'), ('pointwise', 'pw')):
      name = f'conv_{their}_{i}'
      theirs |= _unit(f'{block}/{unit}', name, f'{name}_bn')
  return theirs | {'head': Named('conv_preds', side=1)}


@kinds.checked
def keras_mobilenet_v2(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of Keras' MobileNet V2; its epsilon is 1e-3, its padding (0, 1)."""
  theirs = _unit('stem', 'Conv1', 'bn_Conv1')
  for i, block in _numbered(layers):
    prefix = f'block_{i - 1}' if i > 1 else 'expanded_conv'
    for unit in ('expand', 'depthwise', 'project'):
      if f'{block}/{unit}' in layers:
        name = f'{prefix}_{unit}'
        theirs |= _unit(f'{block}/{unit}', name, f'{name}_BN')
  theirs |= _unit('last', 'Conv_1', 'Conv_1_bn')
  return theirs | {'head': Named('predictions')}


@kinds.checked
def keras_mobilenet_v3(layers: Mapping[str, int]) -> dict[str, Named]:
  """Names of Keras' MobileNet V3, small and large, of Keras 3.

  Its epsilon is 1e-3, its padding TensorFlow's; its last hidden layer keeps the
  published width below a multiplier of 1.
  """
  theirs = _unit('stem', 'conv', 'conv_bn')
  for i, block in _numbered(layers):
    prefix = f'expanded_conv_{i - 1}' if i > 1 else 'expanded_conv'
    for unit in ('expand', 'depthwise', 'project'):
      if f'{block}/{unit}' in layers:
        name = f'{prefix}_{unit}'
        theirs |= _unit(f'{block}/{unit}', name, f'{name}_bn')
    if f'{block}/squeeze' in layers:
      name = f'{prefix}_squeeze_excite_conv'
      theirs[f'{block}/squeeze'] = Named(name, side=1)
      theirs[f'{block}/excite'] = Named(f'{name}_1', side=1)
  theirs |= _unit('last', 'conv_1', 'conv_1_bn')
  theirs['hidden'] = Named('conv_2', side=1)
  return theirs | {'head': Named('logits', side=1)}


def _resnet(layers: Mapping[str, int], head: str, shortcut: str):
  theirs = _unit('stem', 'conv1', 'bn1') | {'head': Named(head)}
  kinds = {
    'conv': 'conv',
    'norm': 'bn',
    'shortcut': f'{shortcut}.0',
    'shortcut_norm': f'{shortcut}.1',
  }
  pattern = rf'stage(\d+)_block(\d+)/({"|".join(kinds)})(\d*)'
  for layer in layers:
    match = re.fullmatch(pattern, layer)
    if match:
      prefix = f'layer{match[1]}.{int(match[2]) - 1}'
      kind = kinds[match[3]]
      theirs[layer] = Named(f'{prefix}.{kind}{match[4]}')
  return theirs


def _vgg_features(layers: Mapping[str, int]) -> tuple[dict[str, Named], int]:
  """Returns the names of the convolutions and norms, and the last width."""
  convs = sorted(layer for layer in layers if '_conv' in layer)
  if not convs:
    raise ValueError(
      f'`layers` must be those of a VGG, with convolutions; got: '
      f'{", ".join(layers) or "none"}.'
    )
  theirs, position, stage = {}, 0, '1'
  for layer in convs:
    position += layer[len('stage')] != stage  # A pooling.
    stage, norm = layer[len('stage')], layer.replace('conv', 'norm')
    theirs[layer] = Named(f'features.{position}')
    if norm in layers:
      theirs[norm] = Named(f'features.{position + 1}')
    position += 3 if norm in layers else 2
  return theirs, layers[convs[-1]]


def _blocks(layers: Mapping[str, int]) -> list[str]:
  """Returns the blocks of a network in the order in which it runs them."""
  names = {layer.partition('/')[0] for layer in layers if '_block' in layer}
  return sorted(names, key=_stage_and_block)


def _numbered(layers: Mapping[str, int]) -> list[tuple[int, str]]:
  """Returns the blocks with their numbers, counted from 1 over all stages.

  A block that is left out keeps its number free, as an identity in its place
  would; but of the last of a stage nothing is left to tell it by, and that
  stage counts as shorter.

  Examples:
    >>> _numbered({'stage1_block1/a': 8, 'stage2_block2/a': 8, 'head': 3})
    [(1, 'stage1_block1'), (3, 'stage2_block2')]
  """
  positions = {name: _stage_and_block(name) for name in _blocks(layers)}
  lengths = dict(positions.values())  # In order, so that the largest stays.
  before = lambda stage: sum(n for s, n in lengths.items() if s < stage)
  return [(before(stage) + i, name) for name, (stage, i) in positions.items()]


def _stage_and_block(name: str) -> tuple[int, int]:
  """Returns the numbers in the name of a block.

  Examples:
    >>> _stage_and_block('stage4_block6')
    (4, 6)
  """
  stage, block = re.findall(r'\d+', name)
  return int(stage), int(block)


# Number of our stages of MobileNet V3 -> the block after which timm divides a
# stage: its width changes there, 80 to 112 (large) and 40 to 48 (small).
_TIMM_V3 = {5: (4, 4), 4: (3, 3)}


def _timm_blocks(
  layers: Mapping[str, int], after: tuple[int, int] | None = None
) -> dict[str, str]:
  """Returns block -> ``blocks.{stage}.{i}``, a stage divided after a block."""
  prefixes = {}
  for name in _blocks(layers):
    stage, block = _stage_and_block(name)
    if after and (stage, block) > after:
      block -= after[1] if stage == after[0] else 0
      stage += 1
    prefixes[name] = f'blocks.{stage - 1}.{block - 1}'
  return prefixes


def _timm_inverted(
  layers: Mapping[str, int], blocks: Mapping[str, str]
) -> dict[str, Named]:
  theirs = _unit('stem', 'conv_stem', 'bn1') | {'head': Named('classifier')}
  for block, prefix in blocks.items():
    units = {'expand': 'pw', 'depthwise': 'dw', 'project': 'pwl'}
    if f'{block}/expand' not in layers:
      units = {'depthwise': 'dw', 'project': 'pw'}
    for i, (unit, their) in enumerate(units.items(), 1):
      conv, norm = f'{prefix}.conv_{their}', f'{prefix}.bn{i}'
      theirs |= _unit(f'{block}/{unit}', conv, norm)
    theirs[f'{block}/squeeze'] = Named(f'{prefix}.se.conv_reduce', side=1)
    theirs[f'{block}/excite'] = Named(f'{prefix}.se.conv_expand', side=1)
  return theirs


def _unit(layer: str, conv: str, norm: str) -> dict[str, Named]:
  return {layer: Named(conv), f'{layer}_norm': Named(norm)}
