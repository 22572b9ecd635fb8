"""urls: schemes, ids and redaction."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dgiqa_stream.urls import redact, redact_text, scheme_of, stream_id_of


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("-", "stdin"),
        ("clip.mp4", "file"),
        ("/videos/a:b.mp4", "file"),
        (r"C:\videos\a.mp4", "file"),
        ("C:/videos/a.mp4", "file"),
        ("file:///videos/a.mp4", "file"),
        ("session.SDP", "sdp"),
        ("RTSP://cam/1", "rtsp"),
        ("camera:0", "camera"),
        ("pattern:noisy?fps=5", "pattern"),
        ("gopher://host/1", "gopher"),
    ],
)
def test_scheme(url, scheme):
    """Paths of every kind are files; URLs are known by what stands before ://."""
    assert scheme_of(url) == scheme


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://admin:hunter2@cam:554/live",
        "rtsp://hunter2@cam/live",
        "rtsp://admin:p@hunter2@cam/live",
        "rtsp://admin:a/hunter2@cam/live",
        "rtsp://admin:a?hunter2@cam/live",
        "rtsp://admin:a#hunter2@cam/live",
        "http://h/x.m3u8?token=hunter2",
        "http://h/x.m3u8?a=1&X-Amz-Signature=hunter2&b=2",
        "http://h/x.m3u8?PASSWORD=hunter2",
        "srt://h:9?passphrase=hunter2&mode=caller",
        "srt://h:9?mode=caller&streamid=#!::u=admin,s=hunter2",
        "http://h/x#access_token=hunter2",
    ],
)
def test_no_secret_is_shown(url):
    """Neither the redacted URL, nor a text that holds it, nor the id shows the password."""
    for shown in (redact(url), redact_text(f"cannot open '{url}': refused"), stream_id_of(url)):
        assert "hunter2" not in shown
        assert "admin" not in shown


def test_what_is_no_secret_stays():
    """Host, port, path and harmless options can be read in messages."""
    url = "udp://239.0.0.1:1234?localaddr=10.0.0.1&pkt_size=1316"
    assert redact(url) == url
    assert redact("rtsp://u:p@cam:554/a/b") == "rtsp://cam:554/a/b"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://admin:pw@cam1.local:554/live/main", "cam1.local-554-live-main"),
        ("/videos/Big Buck.mp4", "Big-Buck"),
        ("-", "stdin"),
        ("camera:0", "camera-0"),
        ("pattern:clean?seconds=2", "pattern-clean"),
    ],
)
def test_id_is_readable(url, name):
    """An id says which source it is."""
    assert stream_id_of(url) == name


@given(st.text(max_size=200))
def test_id_is_always_valid(text):
    """Whatever the URL, the id fits topics and file names and is not empty."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", stream_id_of(text))
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", stream_id_of(f"rtsp://{text}"))


@given(st.text(alphabet=st.characters(exclude_characters="@"), min_size=1, max_size=30))
def test_any_password_is_hidden(password):
    """A marked password never shows, whatever surrounds it."""
    assume(not re.match(r"\d+[/?#]", password))  # a port, to every reader of URLs
    assert "XsecretX" not in redact(f"rtsp://user:{password}XsecretX@cam/live")
