"""Constants that a quantised graph holds several times over, kept once.

The quantiser gives every bias zero points of its own, a number for each channel, and each view that
passes a layer a bias and scales of its own: the same bytes under several names.
"""

from __future__ import annotations

import onnx

_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


def share_constants_(graph: onnx.ModelProto) -> None:
    """Let Q/DQ nodes that read equal constants read one, in place.

    Constants that any other node reads stay as they are: a head's are replaced by name.
    """
    inner = graph.graph
    quantisers = [n for n in inner.node if n.op_type in _QUANTISERS]
    elsewhere = {name for n in inner.node if n.op_type not in _QUANTISERS for name in n.input}
    elsewhere |= {output.name for output in inner.output}
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    shared: dict[str, str] = {}
    for stored in inner.initializer:
        if stored.raw_data and stored.name not in elsewhere:
            key = stored.data_type, tuple(stored.dims), stored.raw_data
            shared[stored.name] = first.setdefault(key, stored.name)
    for node in quantisers:
        for i, name in enumerate(node.input):
            node.input[i] = shared.get(name, name)
    kept = [t for t in inner.initializer if shared.get(t.name, t.name) == t.name]
    copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del inner.initializer[:]
    inner.initializer.extend(copies)
