"""Hosts that dgiqa-stream plugs into, one file or folder each."""
