"""Poolers chosen by name: in the file, by ``--pool``, and what is written of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from dgiqa_stream.config import POOLER_NAMES, PoolingSettings, parse_config
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.pooling import TemporalPooling, pooler_names

ALWAYS = {"mean", "low5", "ewma", "hysteresis"}
PATTERN = "pattern:clean?size=64x48&fps=25&seconds=2"


def test_nothing_chosen_is_everything():
    """Without a choice every pooler is there, in the order of the table."""
    assert pooler_names(PoolingSettings()) == POOLER_NAMES


def test_a_choice_keeps_the_headlines():
    """The baseline, both headlines and the worst 5 % come whatever is chosen, in table order."""
    settings = PoolingSettings(poolers=("vqpool", "p5", "p5"))
    names = pooler_names(settings)
    assert set(names) == ALWAYS | {"vqpool", "p5"}
    assert list(names) == [n for n in POOLER_NAMES if n in names]


def test_parameters_are_told_of_what_is_pooled_alone():
    """Messages carry the settings of the poolers that are there, by their names in the file."""
    settings = PoolingSettings(poolers=("minkowski",), minkowski_p=4.0)
    session = TemporalPooling(settings, stream="cam1", period_seconds=0.2).session()
    assert session.params == {
        "max_hold_seconds": 2.0,
        "ewma_seconds": 5.0,
        "hysteresis_seconds": 2.0,
        "hysteresis_alpha": 0.8,
        "minkowski_p": 4.0,
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hysterisis", "did you mean hysteresis"),
        ("perc5", "did you mean p5"),
        ("P5", "did you mean p5"),
        ("zzz", "known: mean, median"),
    ],
)
def test_an_unknown_pooler_names_the_nearest(name: str, said: str):
    """A misspelt name is refused with the name that was meant, or all of them."""
    with pytest.raises(ConfigError, match=f"pooling.poolers = '{name}' is unknown; ({said})"):
        parse_config({"pooling": {"poolers": ["mean", name]}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hysteresis_alpha", 1.5),
        ("hysteresis_seconds", 0.01),
        ("minkowski_p", 0.5),
        ("vqpool_exponent", -1),
        ("primacy_seconds", 0),
        ("recency_seconds", -3.0),
        ("p1203_seconds", 5),
        ("p1203_seconds", 60.5),
        ("poolers", "mean"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(key: str, value: object):
    """Each parameter of a pooler has a range, and the error says which setting left it."""
    with pytest.raises(ConfigError, match=f"pooling.{key}"):
        parse_config({"pooling": {key: value}})


def test_score_writes_a_row_of_pooled_values_per_input(run_cli, media):
    """``--format pooled`` gives the chosen values of each input, between its extremes."""
    paths = [str(media["vfr"]), str(media["picture_png"])]
    done = run_cli(
        "score", *paths, "--format", "pooled", "--pool", "min,max", "--pool=vqpool", "-q"
    )
    assert (done.code, done.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["path"] for row in rows] == paths
    assert set(rows[0]) == ALWAYS | {
        "path", "num_frames", "coverage", "headline", "min", "max", "vqpool", "in_domain_share"
    }  # fmt: skip
    for row in rows:
        assert row["headline"] == "hysteresis"
        for name in (*ALWAYS, "vqpool"):
            assert float(row["min"]) - 1e-3 <= float(row[name]) <= float(row["max"]) + 1e-3
    assert rows[0]["num_frames"] == "12"
    assert [row["in_domain_share"] for row in rows] == ["0.0", "0.0"]


def test_a_document_of_one_input_has_every_pooled_value(run_cli, media):
    """``pooled_metrics`` of a single video holds all poolers; VMAF's four stay those of frames."""
    done = run_cli("score", media["vfr"], "--format", "json", "-q")
    found = json.loads(done.out)
    pooled, (one,) = found["pooled_metrics"]["dgiqa"], found["inputs"]
    assert set(pooled) == set(POOLER_NAMES)
    scores = [f["metrics"]["dgiqa"] for f in found["frames"]]
    assert pooled["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-3)
    assert pooled["hysteresis"] == one["pooled"]["hysteresis"]
    assert one["headline"] == "hysteresis"
    assert 0.0 < one["coverage"] <= 1.0


def test_an_unknown_pooler_on_the_command_line_is_one_line(run_cli, media):
    """The option is named, the nearest name given, nothing is scored, and the code is 2."""
    done = run_cli("score", media["vfr"], "--pool", "mean,hysterisis")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "error: --pool 'hysterisis' is unknown; did you mean hysteresis?"
    ]


def test_watch_sends_what_was_chosen(run_cli, tmp_path: Path):
    """The option goes over the file, and windows and the summary carry the chosen values."""
    config, out = tmp_path / "stream.toml", tmp_path / "out.ndjson"
    config.write_text('[pooling]\npoolers = ["p10"]\nminkowski_p = 3.0\n')
    arguments = ("--config", config, "--publish", "", "--ndjson", out, "-q", PATTERN)
    done = run_cli("watch", "--pool", "minkowski", *arguments)
    assert done.code == 0
    messages = [json.loads(line) for line in out.read_text().splitlines()]
    pooled = [m for m in messages if m["schema"] in ("dgiqa.window/1", "dgiqa.final/1")]
    assert pooled
    for message in pooled:
        assert set(message["pool"]) == ALWAYS | {"minkowski"}
        assert message["params"]["minkowski_p"] == 3.0
    assert {m["headline"] for m in pooled} == {"ewma", "hysteresis"}
    (final,) = [m for m in messages if m["schema"] == "dgiqa.final/1"]
    assert final["headline"] == "hysteresis"
