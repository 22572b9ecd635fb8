"""Temporal pooling: frame scores over time to one number per window and per session."""

from __future__ import annotations

from dgiqa_stream.pooling._holds import Holds, Pooler
from dgiqa_stream.pooling._windows import TemporalPooling
from dgiqa_stream.pooling.poolers import POOLERS, pooler_names

__all__ = ["POOLERS", "Holds", "Pooler", "TemporalPooling", "pooler_names"]
