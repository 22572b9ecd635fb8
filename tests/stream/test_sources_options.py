"""Options for FFmpeg: it ignores what it does not know, we do not."""

from __future__ import annotations

import pytest

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.sources import check_options, open_source
from dgiqa_stream.sources._container import OPTIONS

# Of the demuxers and protocols that are watched, from FFmpeg's documentation.
KNOWN = (
    *("rtsp_transport", "allowed_media_types", "timeout", "buffer_size", "fifo_size", "localaddr"),
    *("analyzeduration", "probesize", "fflags", "max_delay", "protocol_whitelist", "rw_timeout"),
    *("headers", "user_agent", "cookies", "http_proxy", "reconnect", "tls_verify", "cafile"),
    *("live_start_index", "decryption_key", "pattern_type", "framerate", "rtmp_live"),
)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rtsp_transprot", "did you mean rtsp_transport"),
        ("probe_size", "did you mean probesize"),
        ("qqqqqq", "see FFmpeg's formats"),
        ("streamid", "see FFmpeg's formats"),  # and not some other word
        ("movflags", ""),  # FFmpeg has it, for writing
        ("tcp", ""),  # a value of an option, not an option
        ("\udcff", ""),  # what Python makes of a byte that is no UTF-8
    ],
)
def test_an_unknown_option_is_refused(name, hint, media):
    """An option that FFmpeg would ignore is named before anything is opened, with a similar one."""
    settings = SourceSettings(options={name: "1"})
    with pytest.raises(ConfigError, match=f"source.options: FFmpeg has no option .*{hint}"):
        open_source(str(media["plain"]), settings, stream="s")


def test_an_option_of_srt_belongs_into_the_address():
    """SRT's own options are read from the URL, so that is said; a slip is still named."""
    for name, hint in (("passphrase", r"srt://HOST:PORT\?"), ("probe_size", "did you mean probe")):
        with pytest.raises(ConfigError, match=hint):
            check_options("srt://host:1", {name: "1"})


@pytest.mark.parametrize("url", ["rtsp://host/live", "a.mp4", "-", "srt://host:1"])
def test_known_options_pass(url):
    """Options of FFmpeg's documentation, and all that this package sets itself, are known."""
    ours = {name for options in OPTIONS.values() for name in options}
    check_options(url, dict.fromkeys({*KNOWN, *ours}, "1"))


@pytest.mark.parametrize("url", ["camera:0", "pattern:clean", "other://host"])
def test_sources_of_others_judge_for_themselves(url):
    """What FFmpeg does not open, it cannot know the options of."""
    check_options(url, {"exposure": "1"})


def test_options_of_a_file_are_told_by_key_or_stream(run_cli, tmp_path):
    """An unknown one for all streams is told by its key, one of a stream by the stream's id; 2."""
    file = tmp_path / "stream.toml"
    file.write_text('[source.options]\nfflag = "nobuffer"\n')
    done = run_cli("watch", "a.mp4", "-c", file, "--publish=")
    assert done.code == 2
    assert done.err.startswith("error: source.options: FFmpeg has no option 'fflag'")
    file.write_text('[[stream]]\nurl = "a.mp4"\nid = "cam1"\noptions = {fflag = "nobuffer"}\n')
    done = run_cli("watch", "-c", file, "--publish=")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: options of the stream cam1: FFmpeg has no option 'fflag'; did you mean fflags?"
    ]


def test_an_unknown_option_empties_no_output(run_cli, media, tmp_path):
    """``score`` refuses it before -o is opened, so that what was there stays."""
    kept = tmp_path / "kept.csv"
    kept.write_text("old")
    done = run_cli("score", media["plain"], "-o", kept, "--stream-option", "fflag=nobuffer")
    assert done.code == 2
    assert kept.read_text() == "old"
