"""The ``torch-tensorrt`` backend: the same batches, run by engines that TensorRT builds once."""
