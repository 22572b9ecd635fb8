"""plugins.torch_gpu: frames of one stream that are in scoring together."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
av = pytest.importorskip("av")

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.config import parse_config
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.types import FrameBatch
from dgiqa_stream.wire import FinalMessage, FrameMessage, WindowMessage
from plugins.torch_gpu.backend import FRAMES_IN_FLIGHT
from plugins.torch_gpu.spread import SpreadBackend

NUM_FRAMES = 24


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A second of blots that move, at 24 frames a second, in H.264, with bars above and below."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    rng = np.random.default_rng(0)
    blots = np.kron(rng.integers(0, 256, (18, 48, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for number in range(NUM_FRAMES):
            picture = blots[:, 3 * number : 3 * number + 320].copy()
            picture[:24] = picture[-24:] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def told(clip, model, backend):
    """What is said of the clip: identity and scores of frames and windows, and the summary."""
    memory = MemorySink()
    config = parse_config({"sampler": {"mode": "every"}, "picture": {"letterbox": True}})
    scorer = Scorer(model, backend)
    assert Monitor(str(clip), config=config, scorer=scorer, sinks=[memory]).run().error is None
    frames, (final,) = memory.of(FrameMessage), memory.of(FinalMessage)
    windows = [(m.seq, m.window, m.n, m.pool) for m in memory.of(WindowMessage)]
    said = [(m.seq, m.frame) for m in frames], [w[:3] for w in windows], final.n
    scores = [m.quality.score for m in frames] + [v for w in windows for v in w[3].values()]
    return said, np.array([*scores, final.score, *final.pool.values()], float)


def test_messages_are_those_of_one_at_a_time(clip, model, opened):
    """A clip with bars, four frames in flight against one: the same messages, equal to the last bit
    where the network takes frames one by one, and to a thousandth of a point in shared batches.
    """
    said, scores = told(clip, model, opened(frames_in_flight=1))
    assert len(said[0]) == NUM_FRAMES
    assert np.ptp(scores[:NUM_FRAMES]) > 0.1  # so that their order shows
    alone = told(clip, model, opened(frames_in_flight=4, max_batch=1))
    assert alone[0] == said
    assert np.array_equal(alone[1], scores)
    shared = told(clip, model, opened(frames_in_flight=4, budget_seconds=0.05))
    assert shared[0] == said
    assert shared[1] == pytest.approx(scores, abs=1e-3)


def test_no_more_than_four_frames_are_held(clip, model, opened):
    """A backend whose answers come late gets four frames of a stream, and never a fifth."""
    backend, held, late = opened(frames_in_flight=4), [0], []
    start = backend.start

    def starts(batch, on_done):
        held.append(held[-1] + 1)
        late.append(on_done)
        answer = start(batch, lambda: None)

        def answers():
            held.append(held[-1] - 1)
            return answer()

        return answers

    backend.start = starts
    told(clip, model, backend)
    assert len(late) == NUM_FRAMES
    assert max(held) == 4
    assert held[-1] == 0


def test_frames_are_let_go_without_the_collector(clip, model, opened):
    """Four in flight and no garbage collection: of twenty-four pictures at most a dozen are ever
    alive, those read ahead among them, and none once the session and its services are idle.
    """
    backend = opened(frames_in_flight=4)
    cut, seen, counts = backend.cut, [], []

    def num_alive():
        return sum(samples() is not None for samples in seen)

    def noted(pictures, *given, **known):
        seen.extend(weakref.ref(planes.samples[0]) for planes in pictures)
        counts.append(num_alive())
        return cut(pictures, *given, **known)

    backend.cut = noted
    gc.collect()
    gc.disable()
    try:
        told(clip, model, backend)
        at_the_end = num_alive()
    finally:
        gc.enable()
    assert len(counts) == NUM_FRAMES
    assert max(counts) <= 12
    assert at_the_end <= 5  # the report's worst frames are kept


def test_several_devices_answer_in_order(clip, model, opened):
    """Spread over two backends, a stream's messages are those of one backend and one frame."""
    said, scores = told(clip, model, opened(frames_in_flight=1))
    pair = SpreadBackend([opened(frames_in_flight=3, max_batch=1) for _ in range(2)])
    assert pair.frames_in_flight == 3
    found = told(clip, model, pair)
    assert found[0] == said
    assert np.array_equal(found[1], scores)


def test_a_cpu_has_one_in_flight_unless_it_is_told(opened):
    """A CPU, whose cores are busy with the one, gets no frame more; a GPU does."""
    assert opened().frames_in_flight == 1
    assert FRAMES_IN_FLIGHT > 1


def test_the_call_comes_once_all_frames_of_a_batch_are_done(model, opened):
    """``on_done`` of a batch of three comes when the answer is there without waiting."""
    rng = np.random.default_rng(0)
    shapes = {v.name: v.shape for v in model.manifest.preprocess.views}
    views = {n: rng.integers(0, 256, (3, *s), dtype=np.uint8) for n, s in shapes.items()}
    backend, came = opened(max_batch=1), Future()
    futures = []
    submit = backend._service.submit
    backend._service.submit = lambda *given: futures.append(submit(*given)) or futures[-1]
    answer = backend.start(
        FrameBatch(views),
        lambda: came.done() or came.set_result([future.done() for future in futures[0]]),
    )
    assert came.result(60) == [True] * 3
    wanted = backend.infer(FrameBatch(views)).quality
    assert np.array_equal(answer().quality, wanted)
