"""Networks as files that other programs run: StableHLO and ONNX."""

from jaxprune.export.onnx import save_onnx as save_onnx
from jaxprune.export.stablehlo import PLATFORMS as PLATFORMS
from jaxprune.export.stablehlo import load as load
from jaxprune.export.stablehlo import save as save
