"""TensorRT: its flavour of INT8, a check of a graph's structure, engines."""
