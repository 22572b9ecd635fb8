"""GStreamer: the element ``dgiqaquality``, which scores raw video that passes through it."""
