"""Networks of the papers, in Flax Linen; they do not know of pruning.

Every network is called as ``model.apply(variables, x, train)`` and

- takes ``widths``, path of a layer -> width, so that a shrunk network is the
  same module again: ``resnet20(widths=models.widths(small_params))``;
- has ``num_stages`` stages; ``start`` and ``stop`` run some of them, and one
  after another they give what the whole network gives;
- names blocks that can be skipped, if it has such, in ``bypassable``, and takes
  ``keep``, name -> bool, static or traced, and ``drop``, those to leave out;
- pads explicitly, keeps parameters and logits in float32, and computes in
  ``dtype``.
"""

from jaxprune.models.bert import BERT, bert_base, bert_large
from jaxprune.models.inception import GoogLeNet
from jaxprune.models.layers import widths
from jaxprune.models.lenet import MLP, LeNet5, lenet_300_100, mlp_500
from jaxprune.models.mobilenet import (
  MobileNet,
  MobileNetV1,
  mobilenet_v1,
  mobilenet_v2,
  mobilenet_v3_large,
  mobilenet_v3_small,
)
from jaxprune.models.resnet import (
  ResNet,
  WideResNet,
  resnet18,
  resnet20,
  resnet32,
  resnet34,
  resnet44,
  resnet50,
  resnet56,
  resnet101,
  resnet110,
  resnet_digits,
  wrn_16_8,
)
from jaxprune.models.vgg import VGG, conv6, vgg11, vgg16, vgg19

__all__ = [
  'BERT',
  'MLP',
  'VGG',
  'GoogLeNet',
  'LeNet5',
  'MobileNet',
  'MobileNetV1',
  'ResNet',
  'WideResNet',
  'bert_base',
  'bert_large',
  'conv6',
  'lenet_300_100',
  'mlp_500',
  'mobilenet_v1',
  'mobilenet_v2',
  'mobilenet_v3_large',
  'mobilenet_v3_small',
  'resnet18',
  'resnet20',
  'resnet32',
  'resnet34',
  'resnet44',
  'resnet50',
  'resnet56',
  'resnet101',
  'resnet110',
  'resnet_digits',
  'vgg11',
  'vgg16',
  'vgg19',
  'widths',
  'wrn_16_8',
]
