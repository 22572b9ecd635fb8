"""An application with our element, run by the Python that has GStreamer's bindings (Debian's own).

``/usr/bin/python3 gst_application.py SCENE ARGUMENTS..`` plays a scene and prints a line of JSON
for each thing that an outsider can see of it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
import numpy as np  # noqa: E402
from gi.repository import Gst  # noqa: E402

SECOND = Gst.SECOND
WAIT = 120 * SECOND
ENDS = Gst.MessageType.EOS | Gst.MessageType.ERROR


def tell(**values: object) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def fields(structure: Gst.Structure, *names: str) -> dict[str, object]:
    """Some fields by name; None where there is none."""
    return {name: structure.get_value(name) for name in names if structure.has_field(name)}


class Player:
    """A pipeline, and what our element posts: taken from the bus at once, in any thread."""

    def __init__(self, description: str) -> None:
        self.pipeline = Gst.parse_launch(description)
        self.posted: list[tuple[str, Gst.Structure]] = []
        self.warnings: list[str] = []
        self.some = threading.Condition()
        self.bus = self.pipeline.get_bus()
        self.bus.set_sync_handler(self.look)

    def look(self, bus: Gst.Bus, message: Gst.Message) -> Gst.BusSyncReply:
        """Keep what is ours; the rest waits on the bus."""
        if message.type == Gst.MessageType.WARNING:
            self.warnings.append(message.parse_warning()[0].message)
        if message.type != Gst.MessageType.ELEMENT:
            return Gst.BusSyncReply.PASS
        with self.some:
            self.posted.append((message.get_structure().get_name(), message.get_structure()))
            self.some.notify_all()
        return Gst.BusSyncReply.DROP

    def go(self, state: Gst.State) -> None:
        """Change the state and wait until that is done."""
        assert self.pipeline.set_state(state) != Gst.StateChangeReturn.FAILURE
        assert self.pipeline.get_state(WAIT)[0] != Gst.StateChangeReturn.FAILURE

    def wait_for(self, name: str, number: int) -> None:
        """Until so many messages of that name have come in all."""
        with self.some:
            come = self.some.wait_for(lambda: len(self.of(name)) >= number, 60)
        assert come, (name, number, len(self.of(name)))

    def wait_for_end(self) -> str:
        """``eos``, or what went wrong."""
        message = self.bus.timed_pop_filtered(WAIT, ENDS)
        assert message is not None, "no end"
        if message.type == Gst.MessageType.ERROR:
            return message.parse_error()[0].message
        return "eos"

    def of(self, name: str) -> list[Gst.Structure]:
        """The messages of that name so far."""
        return [structure for kind, structure in self.posted if kind == name]


def states(cycles: str) -> None:
    """PLAYING, READY and again, so many times; then memory, threads and open files."""
    player = Player(
        "videotestsrc is-live=true ! video/x-raw,format=I420,width=320,height=180,framerate=30/1 ! "
        "dgiqaquality fps=0 name=q ! fakesink"
    )
    for cycle in range(int(cycles)):
        begin = len(player.of("dgiqa-frame"))
        player.go(Gst.State.PLAYING)
        player.wait_for("dgiqa-frame", begin + 2)
        player.go(Gst.State.READY)
        final = player.of("dgiqa-final")[-1]
        gc.collect()
        tell(
            cycle=cycle,
            finals=len(player.of("dgiqa-final")),
            reason=final.get_value("reason"),
            scored=final.get_value("counts.scored"),
            frames=len(player.of("dgiqa-frame")) - begin,
            rss=resident_bytes(),
            threads=len(list(Path("/proc/self/task").iterdir())),
            files=len(list(Path("/proc/self/fd").iterdir())),
        )
    player.go(Gst.State.NULL)


def seek(clip: str) -> None:
    """Play, seek back with a flush, play to the end, seek to the start, play to the end again."""
    player = Player(
        f"filesrc location={clip} ! qtdemux ! avdec_h264 ! dgiqaquality fps=0 overload=wait ! "
        "fakesink sync=true"
    )
    player.go(Gst.State.PLAYING)
    player.wait_for("dgiqa-frame", 5)
    for _ in range(2):
        player.pipeline.seek_simple(
            Gst.Format.TIME, Gst.SeekFlags.FLUSH | Gst.SeekFlags.ACCURATE, 0
        )
        tell(end=player.wait_for_end())
    player.go(Gst.State.NULL)
    for name, structure in player.posted:
        wanted = ("session", "frame.pts_seconds", "frame.pts", "frame.discontinuity", "reason", "n")
        tell(name=name, **fields(structure, *wanted))


def caps() -> None:
    """Another size and format while it plays."""
    player = Player(
        "videotestsrc is-live=true ! capsfilter name=c caps=video/x-raw,format=I420,width=320,"
        "height=180,framerate=30/1 ! dgiqaquality fps=0 overload=wait name=q ! fakesink"
    )
    player.go(Gst.State.PLAYING)
    player.wait_for("dgiqa-frame", 2)
    changed = "video/x-raw,format=NV12,width=426,height=242,framerate=30/1"
    player.pipeline.get_by_name("c").set_property("caps", Gst.Caps.from_string(changed))
    begin = len(player.of("dgiqa-frame"))
    player.wait_for("dgiqa-frame", begin + 8)
    player.pipeline.send_event(Gst.Event.new_eos())
    tell(end=player.wait_for_end(), warnings=player.warnings)
    player.go(Gst.State.NULL)
    for structure in player.of("dgiqa-frame"):
        tell(**fields(structure, "frame.width", "frame.height", "frame.pix_fmt", "session"))
    tell(finals=len(player.of("dgiqa-final")))


def long_clock() -> None:
    """Frames whose time is far beyond 32 bits of nanoseconds."""
    player = Player(
        "appsrc name=a format=time caps=video/x-raw,format=GRAY8,width=64,height=64,framerate=1/1 "
        "! dgiqaquality fps=0 overload=wait ! fakesink sync=false"
    )
    player.go(Gst.State.READY)
    player.pipeline.set_state(Gst.State.PLAYING)
    source = player.pipeline.get_by_name("a")
    for number in range(3):
        buffer = Gst.Buffer.new_wrapped(bytes([100 + number]) * 64 * 64)
        buffer.pts, buffer.duration = (100_000 + number) * SECOND, SECOND
        source.emit("push-buffer", buffer)
    source.emit("end-of-stream")
    tell(end=player.wait_for_end(), warnings=player.warnings)
    player.go(Gst.State.NULL)
    for structure in player.of("dgiqa-frame"):
        tell(**fields(structure, "frame.pts", "frame.pts_seconds"))


def pictures(*formats: str) -> None:
    """Each format's planes turned to RGB by us and by GStreamer: how far they are apart."""
    from dgiqa_stream.preprocess import reduced_rgb
    from plugins.gstreamer import video

    for name in formats:
        raw = f"video/x-raw,format={name},width=427,height=241,colorimetry={colorimetry(name)}"
        player = Player(
            f"videotestsrc num-buffers=1 pattern=smpte ! {raw} ! tee name=t ! queue ! "
            "appsink name=ours t. ! queue ! videoconvert chroma-resampler=nearest "
            "dither=none ! video/x-raw,format=RGB,colorimetry=sRGB ! appsink name=theirs"
        )
        player.go(Gst.State.PLAYING)
        found = []
        for sink in ("ours", "theirs"):
            sample = player.pipeline.get_by_name(sink).emit("pull-sample")
            layout = video.layout_of(sample.get_caps())
            buffer = sample.get_buffer()
            with video.mapped(buffer, video.layout_in(buffer, layout)) as planes:
                found.append(reduced_rgb(planes, longest_px=1000).astype(int))
                is_copy = any(part.flags.owndata for part in planes.samples)
        player.go(Gst.State.NULL)
        apart = np.abs(found[0] - found[1])
        tell(
            format=name,
            shape=found[0].shape,
            mean=float(apart.mean()),
            p95=float(np.percentile(apart, 95)),
            copied=is_copy,
        )


def colorimetry(name: str) -> str:
    """Tags for a format."""
    return "sRGB" if name == "RGB" else "1:1:0:0" if name == "GRAY8" else "bt709"


def memory(frames: str) -> None:
    """A long run at full speed; memory at a fifth of it and at its end."""
    player = Player(
        f"videotestsrc num-buffers={frames} pattern=black ! video/x-raw,format=I420,width=640,"
        "height=360 ! dgiqaquality fps=30 name=q ! fakesink name=s signal-handoffs=true"
    )
    passed = 0
    marks = {int(frames) // 5, int(frames) - 1}

    def count(*_: object) -> None:
        nonlocal passed
        passed += 1
        if passed in marks:
            tell(passed=passed, rss=resident_bytes())

    player.pipeline.get_by_name("s").connect("handoff", count)
    player.go(Gst.State.PLAYING)
    tell(end=player.wait_for_end())
    quality = player.pipeline.get_by_name("q")
    counts = fields(
        player.of("dgiqa-final")[0],
        *(f"counts.{name}" for name in ("decoded", "skipped", "dropped_queue", "scored", "failed")),
    )
    tell(
        **counts,
        passed=passed,
        num_scored=quality.get_property("num-scored"),
        num_dropped=quality.get_property("num-dropped"),
    )
    player.go(Gst.State.NULL)


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


SCENES = (states, seek, caps, long_clock, pictures, memory)

if __name__ == "__main__":
    Gst.init(None)
    {scene.__name__: scene for scene in SCENES}[sys.argv[1]](*sys.argv[2:])
