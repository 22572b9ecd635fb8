from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgiqa_stream.backends import BackendStatus
from dgiqa_stream.config import SamplerSettings, SourceSettings, StreamEntry
from dgiqa_stream.errors import ConfigError, SourceUnavailable
from dgiqa_stream.messages import finite
from dgiqa_stream.telemetry import Count, DeviceStatus, Telemetry
from dgiqa_stream.wire import (
    KINDS,
    FrameMessage,
    Message,
    MessageFactory,
    decode,
    encode,
    error_part,
    json_schema,
    new_id,
    slot_of,
    topic_of,
    topic_prefix,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "messages"
MADE_BY = "pytest tests/stream/test_wire.py --update-golden"
NOW_NS = 1_767_225_600_400_000_000  # 2026-01-01T00:00:00.4Z
COUNTS = {Count.DECODED: 130, Count.SKIPPED: 104, Count.DROPPED_STALE: 3, Count.SCORED: 23}


def make_messages(peers: ModuleType) -> dict[str, Message]:
    """One message of each kind, the same at every call but for its session."""
    factory = peers.make_factory(
        run="01KDVNCBW0RUN", clock=lambda: NOW_NS, model=peers.SURE_MANIFEST
    )
    telemetry = Telemetry(clock=lambda: 0.0)
    for what, number in COUNTS.items():
        telemetry.count(what, number)
    known = {"interval": (64.25, 78.25), "out_of_domain": ("hdr", "unfamiliar")}
    frame, low = peers.make_score(5210, keyframe=True, **known), peers.make_score(77, 20.5)
    error = SourceUnavailable("rtsp://u:secret@cam.example/live went away; see that it is on")
    return {
        "frame": factory.frame(frame, counts=COUNTS),
        "window": factory.window(peers.make_window()),
        "status": factory.status(
            "failed",
            telemetry=telemetry.snapshot(),
            error=error,
            lag_seconds=0.05,
            rss_bytes=250_000_000,
            backend=BackendStatus("torch:cuda", "onnxruntime:cpu", "the device was lost"),
            devices=[
                DeviceStatus(
                    "cuda:0",
                    "NVIDIA H200",
                    load=0.4,
                    decoder_load=0.75,
                    used_bytes=2_500_000_000,
                    total_bytes=150_000_000_000,
                    temperature_celsius=51.0,
                    power_watts=310.5,
                    max_batch=64,
                    mean_batch=21.5,
                    num_shrunk=0,
                    num_retried=1,
                )
            ],
            decoder="software (cuda:0 was lost while running)",
        ),
        "meta": peers.make_meta(factory, "rtsp://u:secret@cam.example/live"),
        "final": factory.final(
            peers.make_window("session", 60.0),
            counts=COUNTS,
            duration_seconds=61.5,
            reason="failed",
            error=error,
            worst=[frame, low],
        ),
        "thumbnail": factory.thumbnail(low, b"\xff\xd8\xff\xd9", width=320, height=180),
    }


def fixed(message: Message) -> Message:
    """The message without what differs from run to run or from release to release."""
    message = msgspec.structs.replace(message, session="01KDVNCBW0SESSION")
    if message.kind == "meta":
        versions = msgspec.structs.replace(message.versions, package="0.0.0")
        message = msgspec.structs.replace(message, versions=versions)
    return message


@pytest.fixture(params=KINDS)
def message(request: pytest.FixtureRequest, peers: ModuleType) -> Message:
    """One message of each kind in turn."""
    return fixed(make_messages(peers)[request.param])


def test_there_is_a_message_of_each_kind(peers: ModuleType) -> None:
    """The messages tested here are all there are, and each tells its own kind and schema."""
    made = make_messages(peers)
    assert tuple(made) == KINDS
    assert {type(m) for m in made.values()} == set(get_args(Message))
    for kind, message in made.items():
        assert (message.kind, message.schema) == (kind, f"dgiqa.{kind}/1")
        assert json.loads(encode(message))["schema"] == message.schema


def test_the_golden_message_is_made_again(message: Message, update_golden: bool) -> None:
    """What is published today is byte for byte, as JSON, what was published at the release."""
    path = GOLDEN / f"{message.kind}.json"
    if update_golden:
        value = {"made_by": MADE_BY, "message": json.loads(encode(message))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(path.read_text(encoding="utf-8"))["message"]
    assert json.dumps(json.loads(encode(message))) == json.dumps(golden)
    assert decode(json.dumps(golden).encode()) == message


def in_any_order(schema: Any) -> Any:
    """The same with its alternatives sorted: msgspec's order differs from version to version."""
    if isinstance(schema, dict):
        return {key: in_any_order(value) for key, value in schema.items()}
    return sorted(map(in_any_order, schema), key=str) if isinstance(schema, list) else schema


def test_a_frame_says_how_sure_it_is(peers: ModuleType) -> None:
    """The interval comes with its coverage, the reasons by name; a frame without says null, and no
    coverage of an interval that there is not.
    """
    quality = make_messages(peers)["frame"].quality
    assert (quality.interval, quality.interval_coverage) == ((64.25, 78.25), 0.9)
    assert (quality.in_domain, quality.out_of_domain) == (False, ["hdr", "unfamiliar"])
    for model in (peers.MANIFEST, peers.SURE_MANIFEST):
        quality = peers.make_factory(model=model).frame(peers.make_score()).quality
        assert (quality.interval, quality.interval_coverage) == (None, None)
        assert (quality.in_domain, quality.out_of_domain) == (True, [])


def test_a_reason_that_is_added_later_is_read(peers: ModuleType) -> None:
    """A sender of this major that knows another reason is understood."""
    value = json.loads(encode(make_messages(peers)["frame"]))
    value["quality"]["out_of_domain"] = ["infrared"]
    assert decode(json.dumps(value).encode()).quality.out_of_domain == ["infrared"]


def test_the_shipped_schema_is_the_code(update_golden: bool) -> None:
    """The schema file in the package says exactly what the code publishes."""
    shipped = resources.files("dgiqa_stream") / "assets" / "schema" / "messages-1.json"
    if update_golden:
        Path(str(shipped)).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
        Path(str(shipped)).write_text(text, encoding="utf-8")
    read = json.loads(shipped.read_text(encoding="utf-8"))
    assert in_any_order(read) == in_any_order(json_schema())


def test_messages_fit_the_schema(message: Message) -> None:
    """Another language's validator accepts what is sent, and refuses it without its envelope."""
    validator = jsonschema.Draft202012Validator(json_schema())
    value = json.loads(encode(message))
    validator.validate(value)
    for key in ("stream", "run", "session", "seq", "sent_ns", "wall", "schema"):
        assert not validator.is_valid({k: v for k, v in value.items() if k != key})


def test_both_encodings_say_the_same(message: Message) -> None:
    """JSON and msgpack decode to one message, and encoding it again changes no byte."""
    for encoding in ("json", "msgpack"):
        payload = encode(message, encoding)
        assert decode(payload) == message
        assert encode(decode(payload), encoding) == payload
    assert b"\n" not in encode(message)


def test_unknown_keys_are_ignored(message: Message) -> None:
    """A newer sender of the same major is understood, wherever it has added a field."""

    def extended(value: Any) -> Any:
        if isinstance(value, list):
            return [extended(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {"added_later": [1, {"a": None}]} | {k: extended(v) for k, v in value.items()}

    free = ("settings", "counts", "stages", "pool", "params")  # every key of these is a value
    value = msgspec.to_builtins(message, builtin_types=(bytes,))
    newer = {key: item if key in free else extended(item) for key, item in value.items()}
    newer["added_later"] = 1
    assert decode(msgspec.json.encode(newer)) == message
    assert decode(msgspec.msgpack.encode(newer)) == message


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "truncated"),
        (b"hello", "not a message"),
        (b'{"schema":"dgiqa.frame/2"}', "dgiqa.frame/2"),
        (b'{"schema":"dgiqa.event/1","stream":"a"}', "dgiqa.event/1"),
        (b'{"stream":"cam1"}', "schema"),
        (b"\x81\xa6schema\xaddgiqa.frame/9", "dgiqa.frame/9"),
        (b'{"schema":"dgiqa.status/1","stream":"\xff"}', "utf-8"),
        (b'{"x":' * 100_000, "recursion"),
    ],
)
def test_damage_is_a_value_error(payload: bytes, said: str) -> None:
    """A payload that is no message of this major raises ValueError, which says what is wrong."""
    with pytest.raises(ValueError, match=f"(?i){re.escape(said)}"):
        decode(payload)


@pytest.mark.parametrize(
    "change", [{"stream": "a/b"}, {"stream": ""}, {"seq": -1}, {"state": "ok"}]
)
def test_impossible_fields_are_refused(peers: ModuleType, change: dict[str, Any]) -> None:
    """A well-formed payload with a value that the schema forbids is refused, not passed on."""
    value = json.loads(encode(make_messages(peers)["status"])) | change
    with pytest.raises(ValueError, match=next(iter(change))):
        decode(json.dumps(value).encode())
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(value)


@settings(deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_message_or_a_value_error(payload: bytes) -> None:
    """No payload, however damaged, raises anything but ValueError."""
    with contextlib.suppress(ValueError):
        decode(payload)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_messages_are_a_message_or_a_value_error(peers: ModuleType, data: Any) -> None:
    """Flipping bytes of a real payload raises nothing but ValueError."""
    kind = data.draw(st.sampled_from(KINDS))
    payload = bytearray(
        encode(make_messages(peers)[kind], data.draw(st.sampled_from(["json", "msgpack"])))
    )
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode(bytes(payload))


numbers = st.floats() | st.none()


@settings(deadline=None)
@given(pool=st.dictionaries(st.text(max_size=8), numbers), raw=st.floats(), lag=numbers)
def test_no_infinity_and_no_nan_is_sent(
    peers: ModuleType, pool: dict[str, float | None], raw: float, lag: float | None
) -> None:
    """Values that are not finite arrive as None in both encodings, all others unchanged."""
    factory = peers.make_factory()
    for encoding in ("json", "msgpack"):
        window = decode(encode(factory.window(peers.make_window(pool=pool)), encoding))
        assert window.pool == finite(pool)
        frame = decode(encode(factory.frame(peers.make_score(raw=raw)), encoding))
        assert frame.quality.raw == (raw if math.isfinite(raw) else None)
        status = decode(encode(factory.status("running", lag_seconds=lag), encoding))
        assert status.lag_s == finite(lag)


def test_nan_in_a_message_built_by_hand_is_not_sent(peers: ModuleType) -> None:
    """Encoding itself never lets NaN out, whoever built the message."""
    message = msgspec.structs.replace(make_messages(peers)["window"], pool={"mean": math.nan})
    for encoding in ("json", "msgpack"):
        assert decode(encode(message, encoding)).pool == {"mean": None}


def test_seq_counts_each_topic_by_itself(peers: ModuleType) -> None:
    """Each topic is numbered 0, 1, 2 … whatever the others do, across sessions of a run."""
    factory = peers.make_factory()
    frames = [factory.frame(peers.make_score(i)) for i in range(3)]
    assert factory.status("running").seq == 0
    factory.new_session()
    frames.append(factory.frame(peers.make_score(3)))
    assert [m.seq for m in frames] == [0, 1, 2, 3]
    assert {m.run for m in frames} == {factory.run}


def test_threads_never_share_a_number(peers: ModuleType) -> None:
    """Messages made by several threads at once get every number exactly once."""
    factory, made = peers.make_factory(), []

    def work() -> None:
        made.extend(factory.status("running").seq for _ in range(500))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(2000))


def test_sessions_sort_by_age(peers: ModuleType) -> None:
    """Session ids rise even within a millisecond and while the clock is set back."""
    times = iter([5_000_000_000] * 50 + [1_000_000_000] * 50)
    factory = peers.make_factory(clock=lambda: next(times))
    sessions = [factory.session] + [factory.new_session() for _ in range(90)]
    assert sessions == sorted(set(sessions))
    assert all(re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}", s) for s in sessions)


def test_an_id_holds_its_time() -> None:
    """The first ten characters of an id are its milliseconds in Crockford's base 32."""
    assert new_id(0)[:10] == "0" * 10
    assert new_id(31)[:10] == "000000000Z"
    assert new_id(2**48 - 1)[:10] == "7ZZZZZZZZZ"
    assert len({new_id(0) for _ in range(100)}) == 100


def test_wall_is_sent_ns(peers: ModuleType) -> None:
    """The readable time is the same moment as the number, in UTC."""
    message = make_messages(peers)["frame"]
    assert (message.sent_ns, message.wall) == (NOW_NS, "2026-01-01T00:00:00.400000Z")


def test_a_frame_keeps_what_the_runtime_knew(peers: ModuleType) -> None:
    """A frame's message repeats the frame's own stamp, its latency and the drops by cause."""
    message = make_messages(peers)["frame"]
    assert message.frame.time_base == (1, 90000)
    assert message.frame.pts == 5210 * 3600
    assert message.frame.key
    assert message.time.latency_ms == 62.5
    assert message.time.wall_ns == 1_767_225_600_250_000_000
    assert msgspec.structs.asdict(message.drops) == {
        "skipped": 104,
        "queue": 0,
        "stale": 3,
        "decode": 0,
    }
    unknown = peers.make_factory().frame(peers.make_score(received_at_seconds=0.0)).time
    assert (unknown.wall_ns, unknown.latency_ms) == (None, None)


@pytest.mark.parametrize(
    ("sampler", "period", "biased"),
    [
        ({"mode": "time", "frames_per_second": 5.0}, 0.2, False),
        ({"mode": "time", "frames_per_second": 5.0, "jitter": False}, 0.2, True),
        ({"mode": "every", "every": 1}, None, False),
        ({"mode": "every", "every": 4}, None, True),
        ({"mode": "keyframes"}, None, True),
    ],
)
def test_sampling_that_can_favour_good_frames_says_so(
    peers: ModuleType, sampler: dict[str, Any], period: float | None, biased: bool
) -> None:
    """Only jittered sampling and scoring every frame are called unbiased."""
    made = peers.make_factory(sampler=SamplerSettings(**sampler)).frame(peers.make_score())
    assert (made.sampling.period_s, made.sampling.biased) == (period, biased)


def test_a_session_without_scores_has_an_empty_summary(peers: ModuleType) -> None:
    """A summary of nothing is complete, invalid, without a score and decodable."""
    message = peers.make_factory().final(
        None, counts=COUNTS, duration_seconds=1.0, reason="interrupted"
    )
    assert (message.n, message.valid, message.score, message.pool) == (0, False, None, {})
    assert decode(encode(message)) == message


def test_the_worst_frames_are_lowest_first(peers: ModuleType) -> None:
    """A summary lists its worst frames by rising score, however they were given."""
    assert [w.index for w in make_messages(peers)["final"].worst] == [77, 5210]


def test_no_secret_leaves(peers: ModuleType) -> None:
    """Neither the URL's password, nor another stream's, nor an option's secret is sent."""
    url = "srt://viewer:hunter2@cam.example:9000?passphrase=hunter2"
    config = {
        "source": SourceSettings(
            options={"headers": "Authorization: hunter2", "rtsp_transport": "tcp"}
        ),
        "stream": (StreamEntry(url="rtsp://x:hunter2@other/"),),
    }
    factory = peers.make_factory()
    error = SourceUnavailable(f"cannot open {url}: refused; see that it is on")
    sent = [peers.make_meta(factory, url, **config), factory.status("failed", error=error)]
    for message in sent:
        assert b"hunter2" not in encode(message)
        assert b"cam.example" in encode(message)
    assert sent[0].settings["source"]["options"]["rtsp_transport"] == "tcp"


def test_an_error_is_a_word_and_a_line() -> None:
    """An error's code is its class in snake case, so that programs need not read the text."""
    part = error_part(SourceUnavailable("no route to cam1"))
    assert (part.code, part.detail) == ("source_unavailable", "no route to cam1")


def test_a_topic_ends_with_a_slash(peers: ModuleType) -> None:
    """The topic of cam1 is no prefix of cam10's, and a kind's prefix matches both."""
    one, ten = (peers.make_factory(s).frame(peers.make_score()) for s in ("cam1", "cam10"))
    assert topic_of(one) == b"dgiqa/1/frame/cam1/"
    assert not topic_of(ten).startswith(topic_of(one))
    assert topic_of(ten).startswith(topic_prefix("frame"))


@pytest.mark.parametrize("stream", ["", "a/b", "ä", "a b", "x" * 65])
def test_a_stream_that_is_no_topic_is_refused(peers: ModuleType, stream: str) -> None:
    """An id that could not be subscribed to is refused before anything is sent."""
    with pytest.raises(ConfigError, match="stream id"):
        peers.make_factory(stream)


def test_windows_of_different_length_do_not_replace_each_other(peers: ModuleType) -> None:
    """A 1 s and a 10 s window have different slots; a growing session keeps its slot."""
    factory: MessageFactory = peers.make_factory()

    def slot(kind: str, length: float) -> Any:
        return slot_of(factory.window(peers.make_window(kind, length)))

    assert slot("sliding", 1.0) != slot("sliding", 10.0)
    assert slot("sliding", 10.0) == slot("sliding", 10.0)
    assert slot("session", 10.0) == slot("session", 20.0)
    assert slot("session", 10.0) != slot("sliding", 10.0)
    assert isinstance(factory.frame(peers.make_score()), FrameMessage)
