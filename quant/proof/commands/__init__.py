"""The commands of the proof; only here does it meet training's pictures and checkpoints."""
