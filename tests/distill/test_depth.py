"""Depth maps: the published step, files, the cache, classical cues and Depth Anything networks."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time

import cv2
import numpy as np
import pytest

from dgiqa_stream.errors import ConfigError, ModelError, SourceUnsupported
from distill.data.depth import (
    CachedDepth,
    ClassicalDepth,
    DepthFromFiles,
    open_depth,
    three_channels,
    to_8_bits,
)


def test_the_8_bit_step_is_the_published_formula():
    """Of drawn maps, (d - min) / (max - min + 1e-8) * 255 cut to uint8 gives the same but for the
    epsilon, which is worth one step at most and only where the map's own largest value is.
    """
    rng = np.random.default_rng(2)
    for scale, shift in ((1, 0), (40, -3), (0.01, 5)):
        depth = (rng.standard_normal((40, 60)) * scale + shift).astype(np.float32)
        published = ((depth - depth.min()) / (depth.max() - depth.min() + 1e-8) * 255).astype(
            np.uint8
        )
        found = to_8_bits(depth)
        assert found.min() == 0
        assert found.max() == 255
        differs = found != published
        assert differs.mean() <= 0.001
        assert np.abs(found.astype(int) - published)[differs].max(initial=0) <= 1


@pytest.mark.parametrize("value", [0.0, 7.5, -1e30])
def test_a_constant_map_is_zero(value):
    """A map of one value divides by nothing: it becomes 0 everywhere, without a warning."""
    assert not to_8_bits(np.full((5, 6), value)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_refused(value):
    """One NaN or infinity raises ValueError rather than spreading over the map."""
    depth = np.ones((3, 4))
    depth[1, 1] = value
    with pytest.raises(ValueError, match="finite"):
        to_8_bits(depth)


def test_three_equal_channels():
    """The network is given the map three times: (H, W, 3), every channel the map."""
    depth = np.arange(6, dtype=np.uint8).reshape(2, 3)
    tripled = three_channels(depth)
    assert tripled.shape == (2, 3, 3)
    assert all((tripled[..., c] == depth).all() for c in range(3))


@pytest.mark.parametrize("size", [(8, 8), (96, 128), (31, 400)])
def test_classical_cues_have_the_pictures_size(make_picture, size):
    """Whatever the size, the map is uint8 of that size from 0 to 255, and nearer below."""
    depth = ClassicalDepth()(make_picture(1, *size))
    assert depth.shape == size
    assert depth.dtype == np.uint8
    assert (depth.min(), depth.max()) == (0, 255)
    assert depth[-1].mean() > depth[0].mean() + 50


def test_classical_cues_see_contrast_and_haze(make_picture):
    """Of a picture whose left half is blurred and hazed, the left half lies farther away, beyond
    what its height alone says.
    """
    picture = make_picture(1, 128, 128)
    hazed = cv2.GaussianBlur(picture, (0, 0), 3) // 3 + 170
    picture[:, :64] = hazed[:, :64]
    depth = ClassicalDepth()(picture).astype(float)
    assert depth[:, 80:].mean() > depth[:, :48].mean() + 25


@pytest.fixture
def maps(tmp_path):
    """A folder with maps of 6x4 pixels in every kind of file."""
    ramp = np.arange(24).reshape(4, 6)
    np.save(tmp_path / "floats.npy", ramp / 7.0)
    assert cv2.imwrite(str(tmp_path / "eight.png"), (ramp * 9).astype(np.uint8))
    assert cv2.imwrite(str(tmp_path / "sixteen.png"), (ramp * 2500).astype(np.uint16))
    assert cv2.imwrite(str(tmp_path / "tripled.png"), three_channels((ramp * 9).astype(np.uint8)))
    return tmp_path


@pytest.mark.parametrize("stem", ["floats", "eight", "sixteen", "tripled"])
def test_maps_from_files_of_every_kind(maps, stem):
    """A ramp comes back as the ramp over 0 to 255 from float .npy, 8- and 16-bit .png, and a grey
    .png with three channels, for a picture of the same stem in another folder.
    """
    depth = DepthFromFiles(maps)(np.zeros((4, 6, 3), np.uint8), path=f"elsewhere/{stem}.jpg")
    assert np.array_equal(depth, (np.arange(24).reshape(4, 6) / np.float32(23) * 255).astype("u1"))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: None, ["no depth map", "x.npy or x.png"]),
        (lambda folder: np.save(folder / "x.npy", np.ones((6, 4))), ["4x6", "6x4"]),
        (
            lambda folder: np.save(folder / "x.npy", np.eye(24).reshape(4, 6, 24)),
            ["(4, 6, 24)", "grey"],
        ),
        (lambda folder: np.save(folder / "x.npy", np.full((4, 6), np.nan)), ["finite"]),
        (lambda folder: (folder / "x.npy").write_bytes(b"no array"), ["cannot be read"]),
        (lambda folder: (folder / "x.png").write_bytes(b"no png"), ["no picture"]),
        (lambda folder: (folder / "x.png").write_bytes(b""), ["no picture"]),
        (lambda folder: np.save(folder / "x.npy", {"a": 1}, allow_pickle=True), ["cannot be read"]),
    ],
)
def test_a_map_that_does_not_fit_costs_that_picture(tmp_path, write, words):
    """No map, one of another size or shape, one that is not finite or not readable is an error of
    that input (SourceUnsupported), which names the picture or the file.
    """
    write(tmp_path)
    with pytest.raises(SourceUnsupported) as caught:
        DepthFromFiles(tmp_path)(np.zeros((4, 6, 3), np.uint8), path="x.jpg")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("path", ["clip.mp4", ""])
def test_videos_have_no_maps_in_files(maps, path):
    """Frames of a video, or of nothing known, raise SourceUnsupported that names what would do."""
    with pytest.raises(SourceUnsupported, match="--depth classical"):
        DepthFromFiles(maps)(np.zeros((4, 6, 3), np.uint8), path=path)


class Counting:
    """Classical cues that count how often they are asked."""

    def __init__(self, identity="counting/1"):
        self.identity, self.calls = identity, 0
        self._cues = ClassicalDepth()

    def __call__(self, picture, *, path=""):
        """One map, counted."""
        self.calls += 1
        return self._cues(picture)


def test_a_cached_map_is_the_map(tmp_path, make_picture):
    """A second look at the same picture, under any path, asks nobody and gives the same bytes;
    another picture or another provider is asked; entries are PNGs that OpenCV opens.
    """
    provider, picture = Counting(), make_picture(1, 30, 41)
    cached = CachedDepth(provider, tmp_path / "new" / "cache")
    first = cached(picture, path="a.png")
    assert np.array_equal(cached(picture.copy(), path="b.png"), first)
    assert provider.calls == 1
    cached(make_picture(2, 30, 41))
    cached(np.ascontiguousarray(picture.reshape(41, 30, 3)))
    assert provider.calls == 3
    other = Counting("counting/2")
    CachedDepth(other, tmp_path / "new" / "cache")(picture)
    assert other.calls == 1
    entries = sorted((tmp_path / "new").rglob("*.png"))
    assert len(entries) == 4
    assert any(np.array_equal(cv2.imread(str(e), cv2.IMREAD_UNCHANGED), first) for e in entries)
    assert not list((tmp_path / "new").rglob("*.part"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:],
        lambda content: b"no picture at all",
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path, make_picture, damage, capfd):
    """An entry that is empty, cut, flipped by one bit or other bytes is told of, made again, and
    then good.
    """
    provider, picture = Counting(), make_picture(1, 30, 41)
    cached = CachedDepth(provider, tmp_path)
    wanted = cached(picture)
    (entry,) = tmp_path.rglob("*.png")
    entry.write_bytes(damage(entry.read_bytes()))
    assert np.array_equal(cached(picture), wanted)
    assert provider.calls == 2
    assert "made again" in capfd.readouterr().err
    assert np.array_equal(cached(picture), wanted)
    assert provider.calls == 2


def test_choices_that_cannot_be_are_usage_errors(tmp_path):
    """No folder, a file for a cache, and a network's folder without hf: are errors that say what
    to give instead.
    """
    with pytest.raises(ConfigError, match="no folder of depth maps"):
        open_depth(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give hf:"):
        open_depth(str(tmp_path))
    with pytest.raises(ConfigError, match="no depth maps can be kept"):
        CachedDepth(ClassicalDepth(), tmp_path / "config.json")
    assert isinstance(open_depth("classical"), ClassicalDepth)


@pytest.fixture(scope="module", params=["v1", "v2"])
def network(request, tmp_path_factory):
    """A tiny random Depth Anything of each version, as transformers saves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=8, num_attention_heads=2, image_size=28, patch_size=14,
        out_indices=[5, 6, 7, 8] if request.param == "v1" else [2, 4, 6, 8],
        reshape_hidden_states=False,
    )  # fmt: skip
    second = {"depth_estimation_type": "relative"} if request.param == "v2" else {}
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, initializer_range=0.3, **second,
    )  # fmt: skip
    torch.manual_seed(1)
    net = transformers.DepthAnythingForDepthEstimation(config).eval()
    torch.nn.init.constant_(net.head.conv3.bias, 1.0)  # beyond the last ReLU's zero
    net.save_pretrained(folder)
    settings = {
        "image_processor_type": "DPTImageProcessor", "do_normalize": True, "do_rescale": True,
        "do_resize": True, "ensure_multiple_of": 14, "keep_aspect_ratio": True, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_network_from_a_folder(network, make_picture):
    """A checkpoint of either version gives a map of the picture's size over 0 to 255 that depends
    on the picture, the same each time, and tells itself apart from other weights.
    """
    import torch
    from transformers import DepthAnythingForDepthEstimation

    depth = open_depth(f"hf:{network}")
    pictures = [make_picture(seed, 60, 90) for seed in (1, 2)]
    first, second = (depth(p) for p in pictures)
    assert first.shape == (60, 90)
    assert (first.min(), first.max()) == (0, 255)
    assert not np.array_equal(first, second)
    assert np.array_equal(depth(pictures[0]), first)
    again = open_depth(f"hf:{network}")
    assert again.identity == depth.identity
    net = DepthAnythingForDepthEstimation.from_pretrained(network)
    with torch.no_grad():
        net.head.conv1.weight.mul_(1.01)
    other = network.parent / f"{network.name}_other"
    net.save_pretrained(other)
    (other / "preprocessor_config.json").write_text(
        (network / "preprocessor_config.json").read_text()
    )
    assert open_depth(f"hf:{other}").identity != depth.identity


def test_a_network_sees_what_transformers_own_processor_makes(network):
    """Of a picture that needs no resizing, the map is the network's answer to the normalised
    colours, to 1e-5: one pixel of it is one pixel of the picture.
    """
    import torch
    from transformers import AutoImageProcessor, DepthAnythingForDepthEstimation

    picture = np.random.default_rng(3).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    depth = open_depth(f"hf:{network}")
    inputs = AutoImageProcessor.from_pretrained(network)(picture, return_tensors="pt")
    assert inputs.pixel_values.shape[2:] == (28, 42)
    with torch.no_grad():
        net = DepthAnythingForDepthEstimation.from_pretrained(network).eval()
        wanted = net(**inputs).predicted_depth[0].numpy()
    found = depth.predict(picture)
    assert wanted.max() - wanted.min() > 1e-3
    assert np.abs(found - wanted).max() < 1e-5 * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((28, 28), (28, 28)), ((720, 1280), (28, 56)), ((10, 30), (28, 84)), ((1000, 333), (84, 28))],
)
def test_both_sides_are_at_least_the_networks_own(network, size, wanted):
    """The picture is scaled, up or down, until its shorter side is the network's, each side then a
    multiple of 14: 720x1280 at 518 is 518x924 published, and 28x56 here.
    """
    assert open_depth(f"hf:{network}").input_size(*size) == wanted


def test_metres_are_refused(network):
    """A checkpoint of metric depth, where larger is farther, is a ModelError that says so."""
    folder = network.parent / f"{network.name}_metric"
    folder.mkdir()
    for path in network.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(told | {"depth_estimation_type": "metric", "max_depth": 20})
    )
    with pytest.raises(ModelError, match="metres"):
        open_depth(f"hf:{folder}")


def test_a_downloaded_network_is_found_without_the_hub(network, tmp_path, monkeypatch):
    """What an earlier download kept under a hub id is opened without asking the hub."""
    from huggingface_hub import constants

    kept = tmp_path / "models--some--depth" / "snapshots" / "abc"
    kept.mkdir(parents=True)
    for path in network.iterdir():
        (kept / path.name).write_bytes(path.read_bytes())
    refs = tmp_path / "models--some--depth" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    kept_network = open_depth("hf:some/depth")
    assert kept_network.identity == open_depth(f"hf:{network}").identity


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": "no json"}])
def test_a_folder_without_a_network_is_one_error(tmp_path, content):
    """An empty folder, or one with a configuration of nothing, is a ModelError naming it."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match="no depth network"):
        open_depth(f"hf:{tmp_path}")


@pytest.fixture
def refused():
    """The address of a hub that refuses connections: a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def without_the_network():
    """The address of a hub that answers, and has nothing."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words):
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.mark.parametrize("hub", ["refused", "without_the_network", "switched off"])
def test_a_hub_that_gives_nothing_is_one_error_within_seconds(request, tmp_path, monkeypatch, hub):
    """Where the hub refuses connections, answers with errors only, or is switched off, a hub id
    ends in one line that names the id and each way out, within seconds (its library's own retries
    of a refused connection take two minutes).
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from huggingface_hub import constants

    import distill.data.depth_anything  # noqa: F401  what is timed is no import

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub == "switched off")
    if hub != "switched off":
        monkeypatch.setattr(constants, "ENDPOINT", request.getfixturevalue(hub))
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        open_depth("hf:LiheYoung/depth-anything-small-hf")
    assert time.monotonic() - began < 30  # a second on an idle machine
    for word in ("'LiheYoung/depth-anything-small-hf'", "hf:FOLDER", "--depth classical"):
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_cannot_be_an_id_is_one_error(monkeypatch):
    """Words that are neither a folder nor a hub id are a ModelError, not a traceback."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("no such folder/with spaces", "a/b/c", ""):
        with pytest.raises(ModelError):
            open_depth(f"hf:{name}")
