"""Prometheus: subscribes to publishers and serves what they say as ``/metrics``."""
