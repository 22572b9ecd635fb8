"""The GPU path: decoded planes to scores by torch, many streams at once; see ``docs/gpu.md``.

The runtime finds :mod:`plugins.torch_gpu.backend` by the name ``torch``, once that is asked for.
"""
