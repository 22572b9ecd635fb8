"""A real Prometheus, and our exporter as a process; on pytest's path."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import media_servers as servers

PATIENCE_SECONDS = 60.0
"""On a machine that has other things to do; each wait ends as soon as it can."""
_CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{folder}/rules.yml]
scrape_configs:
  - job_name: dgiqa
    static_configs: [{{targets: ["{target}"]}}]
"""


def require_prometheus(missing: Callable[[str, str], None]) -> None:
    """Skip (or fail, where servers are promised) without Prometheus and its checker of rules."""
    for program in ("prometheus", "promtool"):
        if not shutil.which(program):
            missing(program, "prometheus")


@contextlib.contextmanager
def prometheus(port: int, target: str, rules: str, folder: Path) -> Iterator[str]:
    """Scrapes a target each second; gives the address of its API."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.yml").write_text(rules)
    (folder / "prometheus.yml").write_text(_CONFIG.format(folder=folder, target=target))
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with servers.running(command, folder) as process:
        address = f"http://127.0.0.1:{port}"
        servers.wait_until(lambda: _is_ready(address), "Prometheus", process=process, folder=folder)
        yield address


def _is_ready(address: str) -> bool:
    with contextlib.suppress(OSError):
        return b"Ready" in read(f"{address}/-/ready")
    return False


def read(url: str) -> bytes:
    """What a GET gives; raises ``OSError`` where it fails."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """The series that an expression gives now; an AssertionError where it is refused."""
    asked = urllib.parse.urlencode({"query": expression})
    try:
        found = json.loads(read(f"{address}/api/v1/query?{asked}"))
    except urllib.error.HTTPError as exc:
        raise AssertionError(f"{expression}: {exc.read().decode()}") from exc
    assert found["status"] == "success", found
    series: list[dict[str, Any]] = found["data"]["result"]
    return series


def eventually(what: Callable[[], Any], why: str = "", seconds: float = PATIENCE_SECONDS) -> Any:
    """What it gives once that is true; an AssertionError when it never is."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {why}"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def exporter(
    arguments: Sequence[str], folder: Path, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``dgiqa-stream-prometheus`` on a free port; gives the process and HOST:PORT."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "plugins.prometheus.cli", "--listen", "127.0.0.1:0"]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen([*command, *arguments], stderr=said, env=environment)
    try:
        match = eventually(lambda: _told(folder, process), "the exporter serves")
        yield process, match
    finally:
        process.kill()
        process.wait()


def _told(folder: Path, process: subprocess.Popen[bytes]) -> str:
    said = (folder / "said").read_text()
    assert process.poll() is None, said
    match = re.search(r"http://([\d.]+:\d+)/metrics", said)
    return match[1] if match else ""


def samples(place: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample that an exporter serves now, read by Prometheus's own client library."""
    from prometheus_client.parser import text_string_to_metric_families

    text = read(f"http://{place}/metrics").decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(place: str, name: str, **labels: str) -> float | None:
    """One sample; None where there is none."""
    return samples(place).get((name, frozenset(labels.items())))
