"""Proof: what a compressed model still says, and what it costs, measured on files as served."""
