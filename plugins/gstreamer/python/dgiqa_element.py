"""What GStreamer's loader of Python plugins finds: the element ``dgiqaquality``.

It is looked for in ``python`` below each folder of ``GST_PLUGIN_PATH``; ``python -m
plugins.gstreamer`` prints what to set.
"""

from gi.repository import GObject, Gst

from plugins.gstreamer.element import DgiqaQuality

GObject.type_register(DgiqaQuality)
__gstelementfactory__ = ("dgiqaquality", Gst.Rank.NONE, DgiqaQuality)
