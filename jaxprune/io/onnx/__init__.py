"""Traced functions as ONNX files."""
