"""Networks of the papers, in Flax Linen; they do not know of pruning."""

from jaxprune.models.layers import widths
from jaxprune.models.resnet import (
  ResNet,
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
)

__all__ = [
  'ResNet',
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
  'widths',
]
