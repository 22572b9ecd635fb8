"""What people get wrong: one clear line, the right exit code, no traceback, no hang, no secret."""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading

import msgspec
import pytest

from dgiqa_stream.manifest import load_model, manifest_path

PATTERN = "pattern:clean?size=64x48&seconds=1"
SECRETS = ("hunter2", "bob", "s3cr3t")
PYTHON = [sys.executable, "-m", "dgiqa_stream"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models with something wrong about each."""
    folder = tmp_path_factory.mktemp("models")
    good = load_model()

    def copy(name, manifest=None, content=None):
        (folder / name).write_bytes(content or good.path.read_bytes())
        if manifest is not None:
            manifest_path(folder / name).write_bytes(manifest)

    def changed(**fields):
        return msgspec.json.encode(msgspec.structs.replace(good.manifest, **fields))

    view, *others = good.manifest.preprocess.views
    other = [msgspec.structs.replace(view, height=64, width=64), *others]
    copy("lonely.onnx")
    copy("other.onnx", changed(sha256="0" * 64))
    copy("broken.onnx", b'{"schema": ')
    copy(
        "views.onnx",
        changed(preprocess=msgspec.structs.replace(good.manifest.preprocess, views=other)),
    )
    digest = "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c"  # of "foo\n"
    copy("text.onnx", changed(sha256=digest), b"foo\n")
    return folder


def check(done, code, *told):
    """The exit code, and exactly one line on standard error that tells all of this."""
    assert done.code == code, done
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    for text in told:
        assert text in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing.mp4", "does not exist"),
        ("sub/missing.mp4", "does not exist"),
        ("empty", "is an empty file"),
        ("text", "is no video or picture"),
        ("words", "is a text file, not a video"),
        ("headless", "is no video or picture"),
        ("audio_only", "no video track, only audio"),
        ("cover_art", "no video track"),
        ("a" * 300, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_scored(run_cli, media, name, told):
    """Missing, empty, of another kind, cut before its index, or without video: named, with 3, and
    with its row.
    """
    path = str(media.get(name, name))
    done = run_cli("score", path)
    check(done, 3, path, told)
    header, row = done.out.splitlines()
    assert header.startswith("path,")
    assert row == path + "," * header.count(",")


def test_a_folder_without_media(run_cli, media, tmp_path):
    """Alone it is 3, beside a good picture 4; either way it is named."""
    (tmp_path / "notes.txt").touch()
    check(run_cli("score", tmp_path, "-q"), 3, str(tmp_path), "no picture or video")
    done = run_cli("score", tmp_path, media["grey"], "-q")
    check(done, 4, str(tmp_path), "no picture or video")
    assert done.out.splitlines()[:2] == [
        "path,score,interval_low,interval_high,out_of_domain",
        f"{tmp_path},,,,",
    ]
    check(run_cli("watch", tmp_path, "--publish=", "-q"), 3, str(tmp_path), "is a folder")


def test_no_frame_in_the_chosen_range(run_cli, media):
    """A start after the end is named as such, with 3."""
    check(run_cli("score", media["plain"], "--start", "1000"), 3, "no frame to score")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nope://bob:hunter2@host/x", "unknown scheme 'nope'; known here: camera"),
        ("rtsp://bob:hunter2@127.0.0.1:{refused}/x", "refused the connection"),
        ("http://bob:hunter2@127.0.0.1:{refused}/x?token=s3cr3t", "refused the connection"),
        ("rtmp://bob:hunter2@127.0.0.1:{refused}/x", "error: "),
        ("srt://127.0.0.1:{refused}?passphrase=s3cr3ts3cr3t", "error: "),
        ("http://bob:hunter2@no-such-host.invalid/x", "no address for the host"),
        ("rtsp://bob:hunter2@[::1", "error: "),
        ("http://bob:hunter2@127.0.0.1:{answering}/x.mp4", "404"),
        ("pattern:nonsense", "'nonsense' is not one of clean"),
        ("camera:99", "camera"),
    ],
)
def test_a_source_that_cannot_be_opened(run_cli, refused, answering, url, told):
    """A wrong scheme, host, port or path is one line with 3, and no secret of the URL is shown."""
    done = run_cli("score", url.format(refused=refused, answering=answering), "-q")
    check(done, 3, told)
    assert not [secret for secret in SECRETS if secret in done.out + done.err]


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
@pytest.mark.parametrize("command", ["score", "watch"])
def test_the_loudest_log_keeps_secrets(run_cli, refused, command, scheme):
    """Neither --log-level debug nor a recorded message shows a password of the URL."""
    url = f"{scheme}://bob:hunter2@127.0.0.1:{refused}/x?token=s3cr3t"
    more = ["--publish=", "--ndjson", "-"] if command == "watch" else []
    done = run_cli(command, url, *more, "--log-level", "debug")
    assert done.code == 3
    assert f"{scheme}://127.0.0.1:{refused}/x?token=***" in done.err
    assert [line[:7] for line in done.err.splitlines()].count("error: ") == 1
    assert not [secret for secret in SECRETS if secret in done.out + done.err]


class NotFound(http.server.BaseHTTPRequestHandler):
    """Answers 404 to whatever is asked."""

    def do_GET(self):
        """There is nothing."""
        self.send_error(404)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def answering():
    """The port of an HTTP server that has nothing."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["score"], "Missing argument 'PATH...'"),
        (["score", "x.mp4", "--nope"], "No such option: --nope"),
        (["scores"], "No such command 'scores'"),
        (["score", "x.mp4", "-f", "xml"], "'xml'"),
        (["score", "x.mp4", "--fps", "5", "--every", "2"], "--fps and --every"),
        (["score", "x.mp4", "--fps", "0"], "--fps 0 is refused: give a number above 0 and"),
        (["score", "x.mp4", "--fps", "nan"], "--fps nan is refused"),
        (["score", "x.mp4", "--fps", "inf"], "--fps inf is refused"),
        (["score", "x.mp4", "--start", "inf"], "--start inf is refused"),
        (["score", "x.mp4", "--start", "-1"], "--start -1 is refused: give a number at least 0"),
        (["score", "x.mp4", "--every", "0"], "--every 0 is refused: give a whole number"),
        (["score", "x.mp4", "--every", "two"], "--every"),
        (["score", "x.mp4", "--fail-under", "nan"], "--fail-under nan is not within 0..100"),
        (["score", "x.mp4", "--threads", "10000000"], "--threads"),
        (["score", "x.mp4", "--crop", "0", "0", "0", "5"], "--crop 0,0,0,5 is not a rectangle"),
        (["score", "x.mp4", "--crop", "1", "2"], "--crop"),
        (["score", "x.mp4", "--stream-option", "x"], "is not KEY=VALUE"),
        (["score", "x.mp4", "--stream-option", "probesizes=1"], "did you mean probesize?"),
        (["watch", "x.mp4", "--stream-option", "qqq=1"], "--stream-option: FFmpeg has no option"),
        (["watch", PATTERN, "--curve-dir", "no"], "--curve-dir: no CURVE key in no"),
        (["sub", "tcp://127.0.0.1:1", "--curve-dir", "no"], "--curve-dir: no CURVE key in no"),
        (["score", "x.mp4", "--device", "tpu"], "unknown device 'tpu'"),
        (["score", "x.mp4", "--device", "cuda:0,cuda:1"], "several GPUs need --backend torch"),
        (["score", "x.mp4", "--hardware", "tpu"], "tpu is refused: give one of none, cuda, cuda:N"),
        (["score", "x.mp4", "--log-level", "loud"], "'loud'"),
        (["watch"], "nothing to watch"),
        (["watch", PATTERN, PATTERN], "two streams are named 'pattern-clean'"),
        (["watch", PATTERN, "--id", "a", "--id", "b"], "2 --id for 1 URLs"),
        (["watch", PATTERN, "--id", "a b"], "stream id 'a b'"),
        (["watch", PATTERN, "--publish", "nowhere"], "--publish 'nowhere' is not tcp://HOST:PORT"),
        (["watch", PATTERN, "--publish", "tcp://0.0.0.0:5556"], "or --insecure to"),
        (["watch", PATTERN, "--encoding", "xml"], "--encoding xml is refused: give one of json, "),
        (["watch", PATTERN, "--config", "missing.toml"], "missing.toml"),
        (["sub", "nowhere"], "'nowhere' is not tcp://HOST:PORT"),
        (["sub", "tcp://127.0.0.1:1", "--timeout", "inf"], "--timeout inf"),
        (["sub", "tcp://127.0.0.1:1", "--kind", "all"], "unknown kind 'all'"),
        (["config", "verify", "x.toml"], "`check FILE`"),
    ],
    ids=" ".join,
)
def test_a_wrong_word(run_cli, arguments, told):
    """What cannot be meant is refused in one line that names it, with 2, before anything is
    opened or written.
    """
    done = run_cli(*arguments)
    check(done, 2, told)
    assert done.out == ""


def test_a_crop_outside_of_a_picture(run_cli, media):
    """It is 2 with both sizes; a picture that it fits is scored all the same."""
    done = run_cli(
        *("score", media["plain"], media["grey"], "--crop", "100", "60", "100", "100"),
        *("--every", "24", "-q"),
    )
    check(done, 2, str(media["grey"]), "crop 100,60,100,100", "64x48")
    assert [bool(line.split(",")[3]) for line in done.out.splitlines()[1:]] == [True, False]
    watched = run_cli("watch", PATTERN, "--publish=", "--crop", "100", "0", "10", "10", "-q")
    check(watched, 2, "crop 100,0,10,10", "64x48")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent.onnx", "give a .onnx file or one of"),
        ("lonely.onnx", "has no manifest lonely.onnx.json"),
        ("other.onnx", "its manifest says 000000000000"),
        ("broken.onnx", "broken.onnx.json is not a dgiqa.manifest/2 manifest"),
        ("views.onnx", "its manifest says"),
        ("text.onnx", "text.onnx cannot be opened by ONNX Runtime"),
    ],
)
def test_a_model_that_cannot_be_used(run_cli, media, models, tmp_path, name, told):
    """Missing, without or with another manifest, or unreadable: one line with 5, and what was in
    the file of -o is still there.
    """
    kept = tmp_path / "kept.csv"
    kept.write_text("of yesterday")
    check(run_cli("score", media["grey"], "-m", models / name, "-o", kept), 5, told)
    assert kept.read_text() == "of yesterday"
    if name == "other.onnx":
        check(run_cli("watch", PATTERN, "--publish=", "-m", models / name), 5, told)


@pytest.mark.parametrize("form", ["csv", "ndjson", "json"])
def test_a_full_disk(run_cli, media, form):
    """Each format on a full disk is one line that says so, with 5."""
    done = run_cli("score", media["plain"], "-f", form, "-o", "/dev/full", "--every", "12")
    check(done, 5, "cannot write /dev/full: No space left on device")


@pytest.mark.parametrize(
    "arguments", [["score", "x.png"], ["score", "x.png", "-f", "json"], ["config"], ["models"]]
)
def test_standard_output_on_a_full_disk(run_cli, arguments, media):
    """Data that cannot be written are an error of one line with 5, never silently lost."""
    arguments = [media["grey"] if a == "x.png" else a for a in arguments]
    command = ["sh", "-c", 'exec "$0" "$@" > /dev/full', *PYTHON]
    check(run_cli(*arguments, command=command), 5, "standard output: No space left on device")


@pytest.mark.parametrize("option", [["-o"], ["-f", "json", "-o"]])
def test_an_output_that_cannot_be_opened(run_cli, media, tmp_path, option):
    """A missing folder and a folder in the file's place are told with 5."""
    check(run_cli("score", media["grey"], *option, tmp_path / "no" / "x"), 5, "No such file")
    check(run_cli("score", media["grey"], *option, tmp_path), 5, "Is a directory")


def test_secrets_of_a_stream_toml_stay_there(run_cli, refused, tmp_path):
    """Neither the URL's password nor an option's value of a stream.toml is in what is said,
    recorded or published.
    """
    file, record = tmp_path / "stream.toml", tmp_path / "r.ndjson"
    file.write_text(
        f'[output]\nndjson = "{record}"\n[publish]\nendpoint = ""\n'
        '[source]\nopen_timeout_seconds = 2.0\noptions = {headers = "Token: s3cr3t"}\n'
        f'[[stream]]\nurl = "http://bob:hunter2@127.0.0.1:{refused}/x?key=s3cr3t"\n'
        f'[[stream]]\nurl = "{PATTERN}"\noptions = {{password = "s3cr3t"}}\n'
    )
    done = run_cli("watch", "--config", file, "--log-level", "debug")
    assert done.code == 4
    recorded = record.read_text()
    assert len([m for m in map(json.loads, recorded.splitlines()) if "final" in m["schema"]]) == 2
    for secret in SECRETS:
        assert secret not in done.out + done.err + recorded


def test_no_command_shows_the_commands(run_cli):
    """Without any word the help goes to standard error, with 2."""
    done = run_cli()
    assert (done.code, done.out) == (2, "")
    assert "Commands:" in done.err


def test_a_terminal_as_standard_input_is_refused(run_cli):
    """``-`` without a pipe says so rather than wait for a video to be typed."""
    if not shutil.which("script"):
        pytest.skip("needs `script` to make a terminal")
    command = ["script", "-qec", f"{' '.join(PYTHON)} score - -q", "/dev/null"]
    assert "standard input is a terminal" in run_cli(command=command, timeout_seconds=120).out


def test_an_input_is_never_overwritten(run_cli, media, tmp_path):
    """``-o`` naming an input is a usage error, and the input stays whole."""
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(next(p for p in media.values() if p.suffix == ".mp4").read_bytes())
    before = clip.read_bytes()
    done = run_cli("score", str(clip), "-o", str(clip))
    assert done.code == 2
    assert "choose another name" in done.err
    assert clip.read_bytes() == before


def test_watch_and_report_overwrite_no_input(run_cli, media, tmp_path):
    """A recording onto the watched file, and a report onto its recording, are usage errors."""
    clip, recording = tmp_path / "clip.mp4", tmp_path / "day.ndjson"
    clip.write_bytes(next(p for p in media.values() if p.suffix == ".mp4").read_bytes())
    recording.write_text("{}")
    before = clip.read_bytes()
    watched = run_cli("watch", str(clip), "--ndjson", str(clip), "--publish", "")
    reported = run_cli("report", str(recording), "-o", str(recording))
    assert (watched.code, reported.code) == (2, 2)
    assert clip.read_bytes() == before
    assert recording.read_text() == "{}"
