"""configs/stream.toml documents every setting and states the defaults."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path

import msgspec
import pytest

from dgiqa_stream.config import StreamConfig, StreamEntry, load_config, parse_config
from dgiqa_stream.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
STREAM = CONFIGS / "stream.toml"


def uncommented(text: str) -> str:
    """The file with its commented settings switched on; prose stays commented."""
    return re.sub(r"^# (\[\[\w+\]\]|\w+ = )", r"\1", text, flags=re.MULTILINE)


def tables() -> dict[str, type[msgspec.Struct]]:
    """Each table of the file and the settings that it may hold."""
    found = {f.name: f.type for f in msgspec.structs.fields(StreamConfig)}
    return found | {"stream": StreamEntry}


def keys_of(struct: type[msgspec.Struct]) -> set[str]:
    """The names of a table's settings."""
    return {f.encode_name for f in msgspec.structs.fields(struct)}


def test_the_documented_file_is_the_defaults():
    """configs/stream.toml states exactly what an empty file would give."""
    assert load_config(STREAM) == StreamConfig()


def test_the_shipped_file_is_the_documented_one():
    """What ``dgiqa-stream config`` prints, from within the package, is configs/stream.toml."""
    shipped = resources.files("dgiqa_stream") / "assets" / "stream.toml"
    assert shipped.read_text(encoding="utf-8") == STREAM.read_text(encoding="utf-8")


def test_an_empty_file_is_the_defaults(tmp_path):
    """A file without any setting is valid."""
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    assert load_config(empty) == StreamConfig()


def test_every_setting_is_in_the_file():
    """Each setting of the code stands in its table of the file, commented where it has no value."""
    written = tomllib.loads(uncommented(STREAM.read_text(encoding="utf-8")))
    for table, struct in tables().items():
        shown = written[table]
        assert set(shown[0] if table == "stream" else shown) == keys_of(struct), table


def test_commented_settings_would_be_accepted():
    """Whoever switches a commented setting on gets a valid configuration."""
    settings = parse_config(tomllib.loads(uncommented(STREAM.read_text(encoding="utf-8"))))
    assert settings.stream[0].url.startswith("rtsp://")


def test_every_setting_stands_with_a_default_or_a_comment():
    """Only settings whose default is absent are commented; all others show their value."""
    written = tomllib.loads(STREAM.read_text(encoding="utf-8"))
    for table, struct in tables().items():
        if table == "stream":
            continue
        absent = {f.encode_name for f in msgspec.structs.fields(struct) if f.default is None}
        assert keys_of(struct) - set(written[table]) == absent, table


@pytest.mark.parametrize(
    ("table", "wrong", "right"),
    [
        ("sampler", "frames_per_secnod", "frames_per_second"),
        ("source", "open_timeout", "open_timeout_seconds"),
        ("publish", "end_point", "endpoint"),
        ("picture", "letter_box", "letterbox"),
        ("pooling", "hop", "hop_seconds"),
    ],
)
def test_an_unknown_setting_names_the_near_miss(table, wrong, right):
    """A misspelt setting is refused with its full name and the setting that was meant."""
    with pytest.raises(ConfigError) as caught:
        parse_config({table: {wrong: 1}})
    assert f"{table}.{wrong}" in str(caught.value)
    assert right in str(caught.value)


def test_an_unknown_table_names_the_near_miss():
    """A misspelt table is refused like a misspelt setting."""
    with pytest.raises(ConfigError, match="did you mean sampler"):
        parse_config({"samplers": {}})


def test_an_unknown_setting_of_a_stream_is_refused():
    """The tables of single streams are as strict as the others, and are counted from 0."""
    entries = [{"url": "udp://127.0.0.1:5000"}, {"url": "a.mp4", "ids": "x"}]
    with pytest.raises(ConfigError, match=r"stream\[1\]\.ids.*did you mean stream\[1\]\.id"):
        parse_config({"stream": entries})


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("sampler", "frames_per_second", 0),
        ("sampler", "mode", "all"),
        ("source", "decoder_threads", "two"),
        ("picture", "crop", [0, 0, 10]),
        ("pooling", "windows_seconds", [-1.0]),
    ],
)
def test_a_value_out_of_range_names_its_setting(table, key, value):
    """A value that cannot be is refused with the name of its setting."""
    with pytest.raises(ConfigError, match=key):
        parse_config({table: {key: value}})


def test_a_file_error_names_the_file(tmp_path):
    """What is wrong in a file is reported with the file's name."""
    broken = tmp_path / "broken.toml"
    broken.write_text("[sampler\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        load_config(broken)
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.toml")), ids=lambda p: p.relative_to(CONFIGS).as_posix()
)
def test_every_configuration_is_toml(path):
    """Each shipped configuration parses and sets something."""
    assert tomllib.loads(path.read_text(encoding="utf-8"))
