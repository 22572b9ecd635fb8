"""The command line's other commands: models, config, doctor, keys, report, sub and the version."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib

import pytest

from dgiqa_stream.config import StreamConfig, default_file, parse_config
from dgiqa_stream.manifest import DEFAULT_MODEL, load_model, manifest_path, shipped_models

PATTERN = "pattern:clean?size=64x48&fps=25"


def test_the_version_is_told(run_cli):
    """--version prints one line with the package's name, to standard output."""
    done = run_cli("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("dgiqa-stream ")
    assert len(done.out.splitlines()) == 1


def test_models_are_listed_with_their_digests(run_cli):
    """Each shipped model has a row with the start of its digest; --json gives whole manifests."""
    done = run_cli("models")
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert done.code == 0
    assert rows[0][0] == "name"
    assert {r[0].removesuffix(" (default)") for r in rows[1:]} == set(shipped_models())
    (default,) = [r for r in rows if r[0].endswith(" (default)")]
    assert default[0] == f"{DEFAULT_MODEL} (default)"
    assert load_model().manifest.sha256.startswith(default[-1])
    whole = json.loads(run_cli("models", "--json").out)
    assert whole[DEFAULT_MODEL]["sha256"] == load_model().manifest.sha256


def test_shipped_models_verify(run_cli):
    """``models verify`` scores with every shipped model, and a name alone with that one; a row has
    the digest, the graph's inputs and a score on the scale.
    """
    done = run_cli("models", "verify")
    head, *rows = [line.split("\t") for line in done.out.splitlines()]
    assert (done.code, done.err) == (0, "")
    assert [row[0] for row in rows] == list(shipped_models())
    for row in (dict(zip(head, cells, strict=True)) for cells in rows):
        manifest = load_model(row["model"]).manifest
        assert manifest.sha256.startswith(row["sha256"])
        assert all(view.name in row["inputs"] for view in manifest.preprocess.views)
        assert 0 < float(row["score"]) < 100
    one = json.loads(run_cli("models", "verify", DEFAULT_MODEL, "--json").out)
    assert one[DEFAULT_MODEL]["sha256"] == load_model().manifest.sha256


def cut_short(model):
    """Half a download."""
    model.write_bytes(model.read_bytes()[:-100])


def without_manifest(model):
    """One of two files was copied."""
    manifest_path(model).unlink()


def of_another_export(model):
    """The manifest of another file."""
    changed(model, sha256="0" * 64)


def of_another_size(model):
    """A manifest whose fields disagree."""
    changed(model, size_bytes=7)


def not_a_graph(model):
    """Whole according to its manifest, and yet no model."""
    model.write_bytes(b"not a graph")
    changed(model, sha256=hashlib.sha256(b"not a graph").hexdigest(), size_bytes=11)


def of_other_inputs(model):
    """A manifest that describes other views than the graph takes."""
    text = manifest_path(model).read_text(encoding="utf-8")
    manifest_path(model).write_text(text.replace('"height": 32', '"height": 64'))


def of_other_outputs(model):
    """A manifest that names an output which the graph has not."""
    changed(model, output={"name": "mos", "mapping": {"raw": [0, 1], "score": [0, 100]}})


def changed(model, **fields):
    """Write fields of the manifest anew."""
    beside = manifest_path(model)
    beside.write_text(json.dumps(json.loads(beside.read_text(encoding="utf-8")) | fields))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, "sure.onnx has sha256 "),
        (without_manifest, "sure.onnx has no manifest sure.onnx.json beside it"),
        (of_another_export, "its manifest says 000000000000"),
        (of_another_size, "its manifest says 7: export it again"),
        (not_a_graph, "sure.onnx cannot be opened by ONNX Runtime"),
        (of_other_inputs, "they belong to different models"),
        (of_other_outputs, "its manifest says 'mos' with one number a frame"),
        (lambda model: model.unlink(), "no model '"),
    ],
)
def test_a_model_that_is_not_fine_is_one_line(run_cli, sure_model, damage, told):
    """Each kind of damage is one line that names the file, and 5; a good model beside it is still
    verified, and the bad one was fine before.
    """
    model = sure_model()
    fine = run_cli("models", "verify", model)
    assert (fine.code, fine.err) == (0, "")
    assert "quality, spread, unfamiliar" in fine.out
    damage(model)
    done = run_cli("models", "verify", model, DEFAULT_MODEL)
    (line,) = done.err.splitlines()
    assert done.code == 5
    assert line.startswith("error: ")
    assert str(model) in line
    assert told in line
    assert [row.split("\t")[0] for row in done.out.splitlines()] == ["model", DEFAULT_MODEL]


def test_models_takes_no_other_word(run_cli):
    """Anything but ``verify`` is refused with 2 and lists nothing."""
    done = run_cli("models", "audit")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == ["error: models 'audit': give nothing, or `verify [MODEL...]`"]


def test_a_model_of_ones_own_works_everywhere(run_cli, sure_model, tmp_path):
    """A path is taken by ``score``, ``watch``, ``doctor`` and a configuration file, as an option,
    a variable or a setting; each says that it is that model.
    """
    model, record = str(sure_model()), tmp_path / "r.ndjson"
    clip = f"{PATTERN}&seconds=1"
    scored = run_cli("score", clip, "-f", "json", "-q", "--model", model)
    assert json.loads(scored.out)["model"]["id"] == "sure"
    told = {"DGIQA_MODEL": model}
    watched = run_cli("watch", clip, "--publish=", "--ndjson", record, "-q", environment=told)
    assert watched.code == 0, watched.err
    messages = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    meta = next(m for m in messages if m["schema"].startswith("dgiqa.meta"))
    assert meta["model"]["id"] == "sure"
    examined = json.loads(run_cli("doctor", "--json", "-m", model).out)
    assert examined["benchmark"]["model"].startswith("sure 1.0.0")
    file = tmp_path / "stream.toml"
    file.write_text(f"[model]\nname = {json.dumps(model)}\n")
    assert run_cli("config", "check", file).code == 0
    manifest_path(tmp_path / "sure.onnx").unlink()
    refused = run_cli("config", "check", file)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "has no manifest sure.onnx.json" in refused.err


def test_config_prints_what_it_would_read(run_cli, tmp_path):
    """The printed file is the documented default, equal to no file at all, and passes the check."""
    done = run_cli("config")
    assert (done.code, done.err) == (0, "")
    assert done.out == default_file()
    assert parse_config(tomllib.loads(done.out)) == StreamConfig()
    file = tmp_path / "stream.toml"
    file.write_text(done.out + '\n[[stream]]\nurl = "rtsp://cam/live"\n')
    checked = run_cli("config", "check", file)
    assert (checked.code, checked.out) == (0, "")
    assert f"{file}: fine, 1 stream\n" in checked.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[sampler]\nframes_per_secnod = 3\n", "did you mean sampler.frames_per_second?"),
        ("[sampler]\nframes_per_second = 0\n", "sampler.frames_per_second = 0 is refused: give a"),
        ('[sampler]\nmode = "all"\n', "= all is refused: give one of every, keyframes, time"),
        ("[source]\ntrack = -1\n", "source.track = -1 is refused: give a whole number at least 0"),
        ('[source]\nrealtime = "no"\n', "source.realtime = no is refused: give true or false"),
        ("[pooling]\nwindows_seconds = [1, 0]\n", "pooling.windows_seconds[1] = 0 is refused"),
        ('[[stream]]\nid = "x"\n', "stream[0] has no url"),
        ("[source.options]\nprobesize = 5\n", "source.options holds a value that is no text"),
        ("[smapler]\n", "did you mean sampler?"),
        ("sampler = 3\n", "sampler is refused: give a table"),
        ('[[stream]]\nurl = "x"\nid = "a b"\n', "stream[0].id"),
        ('[[stream]]\nurl = "x"\nname = "y"\n', "unknown setting stream[0].name"),
        ("[picture]\ncrop = [1, 2]\n", "crop [1, 2] must be"),
        ("[source\n", "is not TOML"),
        ("[source]\nstart_seconds = inf\n", "source.start_seconds"),
    ],
)
def test_a_wrong_setting_is_named(run_cli, tmp_path, text, told):
    """An unknown key, a value out of range and broken TOML are one line with the file, and 2."""
    file = tmp_path / "stream.toml"
    file.write_text(text)
    done = run_cli("config", "check", file)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert str(file) in line
    assert told in line


STREAM = '[[stream]]\nurl = "rtsp://cam/live"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (STREAM + STREAM, "two streams are named 'cam-live'"),
        ('[[stream]]\nurl = "htp://x/y"\n', "htp://x/y: unknown scheme 'htp'"),
        ('[[stream]]\nurl = ""\n', "'' names nothing"),
        ('[publish]\nendpoint = "tcp://0.0.0.0:1"\n', "can be reached from other machines"),
        ('[publish]\ncurve_dir = "absent"\n', "absent"),
        ('[model]\nname = "nosuch"\n', "no model 'nosuch'"),
        ('[model]\ndevice = "zzz"\n', "unknown device 'zzz'"),
        ('[model]\nbackend = "zzz"\n', "unknown backend 'zzz'"),
        ('[output]\nndjson = "x"\ncsv = "x"\n', "would be the same file"),
        ('[source.options]\nprobesiez = "5"\n' + STREAM, "did you mean probesize"),
    ],
)
def test_config_check_refuses_what_watch_would(run_cli, tmp_path, text, told):
    """What can be known without a source or a port is one line with the file and 2."""
    file = tmp_path / "stream.toml"
    file.write_text(text)
    done = run_cli("config", "check", file)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert told in line


@pytest.mark.parametrize(
    "words",
    [
        ("score", ""),
        ("score", "a.png", " "),
        ("score", "file:"),
        ("score", "a.png", "-o", ""),
        ("watch", "", "--publish="),
        ("report", ""),
        ("keys", "", "server"),
        ("config", "check", ""),
        ("sub", ""),
    ],
    ids=repr,
)
def test_an_empty_path_is_not_the_current_folder(run_cli, words):
    """As of an unset variable in a script: it is refused with 2, and nothing is scored or made."""
    done = run_cli(*words)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")


def test_doctor_finds_by_trying(run_cli):
    """It names versions, decoders and a usable CPU engine, and has a measured speed; --json says
    the same by topic. A model that cannot be used is told, not fatal.
    """
    found = json.loads(run_cli("doctor", "--json").out)
    topics = {"versions", "machine", "decoding", "engines", "publishing", "benchmark"}
    assert set(found) == topics
    assert "h264" in found["decoding"]["decoders"]
    assert found["engines"]["cpu"] == "usable (onnxruntime:cpu)"
    (speed,) = [value for name, value in found["benchmark"].items() if name.startswith("ms per")]
    assert speed > 0
    broken = run_cli("doctor", "--model", "absent")
    assert broken.code == 0
    assert all(topic in broken.out.splitlines() for topic in topics)
    assert "  asked for: onnxruntime on auto: not usable: no model 'absent'" in broken.out
    assert "  failed: no engine: see above" in broken.out


def test_doctor_says_what_a_choice_comes_to(run_cli):
    """Backend and hardware that are named are tried: what runs is told, what does not with its
    reason; only ``--strict`` makes that exit code 5, and an unknown name is a wrong word.
    """
    fine = json.loads(run_cli("doctor", "--json", "--device", "cpu").out)
    assert fine["engines"]["asked for"] == "onnxruntime on cpu: onnxruntime:cpu"
    assert fine["decoding"]["asked for"] == "software"
    assert "ask by --hardware cuda" in fine["decoding"]["cuda"]
    assert "ask by --backend torch" in fine["engines"]["torch"]
    options = ("doctor", "--json", "--device", "cuda:77", "--hardware", "cuda:77")
    lax, strict = run_cli(*options), run_cli(*options, "--strict")
    assert (lax.code, strict.code) == (0, 5)
    for topic in ("engines", "decoding"):
        told = json.loads(lax.out)[topic]["asked for"]
        assert told.partition(": ")[2].startswith("not usable: ")
        assert "cuda:77" in told
    assert len(strict.err.splitlines()) == 2
    assert "cuda" not in json.loads(lax.out)["decoding"]  # it was tried
    for option, value in (("--backend", "abacus"), ("--device", "tpu"), ("--hardware", "gpu")):
        wrong = run_cli("doctor", option, value)
        assert (wrong.code, len(wrong.err.splitlines())) == (2, 1)
        assert value in wrong.err


def test_keys_are_made_once_and_in_their_folder(run_cli, tmp_path):
    """A key pair is written with the secret readable by its owner alone; it is never overwritten,
    and no name leads out of the folder.
    """
    folder = tmp_path / "keys"
    done = run_cli("keys", folder, "server")
    assert (done.code, done.out) == (0, "")
    assert {p.name for p in folder.iterdir()} == {"server.key", "server.key_secret"}
    assert (folder / "server.key_secret").stat().st_mode & 0o777 == 0o600
    secret = (folder / "server.key_secret").read_text()
    again = run_cli("keys", folder, "server")
    assert again.code == 2
    assert "exists: remove it first" in again.err
    assert (folder / "server.key_secret").read_text() == secret
    outside = run_cli("keys", folder, "../outside")
    assert outside.code == 2
    assert "'../outside' names no key" in outside.err
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]


def test_a_recording_becomes_a_report(run_cli, tmp_path):
    """What ``watch`` recorded becomes a page beside it, with a PNG where asked; a missing or empty
    recording is 3, a page that cannot be written 5.
    """
    pytest.importorskip("matplotlib")
    record, png = tmp_path / "r.ndjson", tmp_path / "r.png"
    watched = run_cli("watch", f"{PATTERN}&seconds=2", "--publish=", "--ndjson", record, "-q")
    assert watched.code == 0
    done = run_cli("report", record, "--png", png)
    assert (done.code, done.out) == (0, "")
    assert (tmp_path / "r.html").read_text().startswith("<!")
    assert png.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.ndjson").touch()
    for path, told in ((tmp_path / "no.ndjson", "No such file"), ("empty.ndjson", "empty.ndjson")):
        failed = run_cli("report", tmp_path / path)
        assert failed.code == 3
        assert told in failed.err
        assert len(failed.err.splitlines()) == 1
    unwritten = run_cli("report", record, "-o", tmp_path / "no" / "r.html")
    assert unwritten.code == 5
    assert len(unwritten.err.splitlines()) == 1


def test_what_score_wrote_becomes_a_report(run_cli, media, tmp_path):
    """NDJSON of ``score`` is a recording as well."""
    pytest.importorskip("matplotlib")
    rows = tmp_path / "rows.ndjson"
    assert run_cli("score", media["plain"], "-f", "ndjson", "-o", rows, "-q").code == 0
    assert run_cli("report", rows, "-o", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_sub_without_a_publisher_says_so(run_cli):
    """After --timeout without a message: one line with a question to start from, and 3."""
    done = run_cli("sub", "tcp://127.0.0.1:1", "--timeout", "0.2")
    assert (done.code, done.out) == (3, "")
    assert done.err.splitlines() == [
        "error: no message from tcp://127.0.0.1:1: is a publisher running there?"
    ]


def test_watch_draws_a_table_on_a_terminal(run_on_terminal):
    """On a terminal the streams are a table that is redrawn; standard output stays empty."""
    arguments = ("--publish=tcp://127.0.0.1:*", "--realtime", f"{PATTERN}&seconds=3")
    done = run_on_terminal("watch", *arguments)
    assert (done.code, done.out) == (0, "")
    text = done.err
    assert "publishing on tcp://127.0.0.1:" in text
    assert "worst 5 %" in text
    assert "█" in text
    assert "pattern-clean: end of stream" in text
    assert not re.search(r" 0\.0 +0 *[\r\n]", text)  # a rate that is not yet known is no rate of 0


def test_a_terminal_keeps_only_the_error(run_on_terminal):
    """The table of a source that never opened is erased before the error is told."""
    done = run_on_terminal("watch", "missing.mp4")
    assert (done.code, done.out) == (3, "")
    text = done.err
    assert text.endswith("error: missing.mp4: does not exist; check the name\r\n")
    assert text.rfind("failed") < text.rfind("\x1b[2K")  # erase this line
