"""Compression and export of the models: float torch to ONNX, ONNX to INT8, with proof."""
