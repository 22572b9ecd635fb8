"""Compression of trained models: export, INT8, one head for both precisions."""

import os

# ONNX Runtime's Linux wheels tell their maker of every run unless they are told not to, and must be
# told before they are loaded; nothing else in this package is loaded earlier.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
