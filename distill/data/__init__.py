"""Rated pictures, degraded pictures and the packs they are stored in."""
