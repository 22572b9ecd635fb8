"""HDR as decoded: tags and peaks that encoders wrote, light as zimg (FFmpeg's zscale) sees it."""

from __future__ import annotations

import json
import logging
import struct
import subprocess

import hdr_reference as reference
import media_servers as servers
import numpy as np
import pytest
from ffmpeg_clips import X265, make_one, packed, raw, read

from dgiqa_stream.preprocess import reduced_rgb

pytestmark = pytest.mark.servers

PQ = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
HLG = "colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc"
DISPLAY = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L({},50)"


@pytest.fixture(autouse=True)
def needs_ffmpeg(missing_server):
    """The reference of every test here."""
    servers.require_ffmpeg(missing_server)


def hevc(parameters):
    """An encoding at 10 bits with x265's parameters."""
    return f"{X265}:{parameters} -pix_fmt yuv420p10le -tag:v hvc1"


TOLD = {  # name: (x265's parameters, transfer, peak, primaries)
    "pq": (PQ, "pq", 1000.0, "bt2020"),
    "display": (f"{PQ}:{DISPLAY.format(40_000_000)}", "pq", 4000.0, "bt2020"),
    "content": (f"{PQ}:{DISPLAY.format(40_000_000)}:max-cll=600,300", "pq", 600.0, "bt2020"),
    "beyond-it": (f"{PQ}:{DISPLAY.format(8_000_000)}:max-cll=5000,90", "pq", 800.0, "bt2020"),
    "empty": (f"{PQ}:{DISPLAY.format(20_000_000)}:max-cll=0,0", "pq", 2000.0, "bt2020"),
    "absurd": (f"{PQ}:max-cll=60000,90", "pq", 1000.0, "bt2020"),
    "p3": (PQ.replace("colorprim=bt2020", "colorprim=smpte432"), "pq", 1000.0, "p3"),
    "narrow": (PQ.replace("colorprim=bt2020", "colorprim=bt709"), "pq", 1000.0, "bt709"),
    "hlg": (HLG, "hlg", 1000.0, "bt2020"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize("name", TOLD)
def test_tags_and_peaks_are_the_encoders(tmp_path, name, suffix):
    """Every frame carries the transfer, the primaries and the lower of the two peaks that the
    stream tells; 1,000 cd/m² where it tells none that can be.
    """
    parameters, *wanted = TOLD[name]
    path = make_one(tmp_path / f"clip.{suffix}", hevc(parameters), size=(160, 96))
    _, frames = read(path)
    assert len(frames) == 10
    for frame in frames:
        hdr = frame.planes.hdr
        assert [hdr.transfer, hdr.peak_cd_m2, hdr.primaries] == wanted
        assert frame.info.dynamic_range == wanted[0]


def test_sdr_of_bt2020_is_no_hdr(tmp_path):
    """Wide primaries alone are not tone mapped: it is the transfer that counts."""
    tags = "colorprim=bt2020:transfer=bt2020-10:colormatrix=bt2020nc"
    _, frames = read(make_one(tmp_path / "clip.mp4", hevc(tags), size=(160, 96)))
    assert {f.planes.hdr for f in frames} == {None}
    assert {f.info.dynamic_range for f in frames} == {"sdr"}


# Light ----------------------------------------------------------------------------------------

SIDE, PATCH = 16, 8
TRANSFERS = {"pq": "smpte2084", "hlg": "arib-std-b67"}


def chart(bits, *, grey):
    """Limited-range Y'CbCr codes of patches that are colours: (3, SIDE x PATCH, SIDE x PATCH)."""
    signal = np.random.default_rng(2).random((SIDE, SIDE, 3)) ** 1.5
    if grey:
        signal[...] = signal[..., :1]
    planes = reference.planes_of_signal(signal, bits=bits).samples
    return np.stack(planes).repeat(PATCH, axis=1).repeat(PATCH, axis=2).astype("<u2")


def light_by_zimg(path, transfer):
    """cd/m² of R, G and B of BT.2020 as another library finds them: float (SIDE, SIDE, 3)."""
    size = SIDE * PATCH
    coded = f"tin={TRANSFERS[transfer]}:min=2020_ncl:pin=2020:rangein=limited"
    linear = f"zscale={coded}:t=linear:npl=1000:p=2020"
    found = servers.ffmpeg("-i", path, "-vf", f"{linear},format=gbrpf32le", "-f", "rawvideo", "-")
    planes = np.frombuffer(found, "<f4").reshape(3, size, size)[[2, 0, 1]]
    return 1000 * planes[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].transpose(1, 2, 0)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_light_is_zimgs(tmp_path, missing_server, transfer, bits):
    """A chart in PQ or HLG has the light that zimg gives it, and comes to SDR by BT.2390's formula
    and BT.2087's matrix (of four digits: see the tolerance).

    Greys only of HLG: zimg takes each component to the power 1.2, where BT.2100's OOTF takes the
    luminance.
    """
    filters = subprocess.run(["ffmpeg", "-filters"], capture_output=True, check=True).stdout
    if b" zscale " not in filters:
        missing_server("zscale", "ffmpeg")
    size = SIDE * PATCH
    path = tmp_path / "chart.mkv"
    tags = f"-colorspace bt2020nc -color_primaries bt2020 -color_trc {TRANSFERS[transfer]}".split()
    servers.ffmpeg(
        *f"-f rawvideo -pix_fmt yuv444p{bits}le -s {size}x{size} -i pipe:0 -c:v ffv1".split(),
        *(*tags, "-color_range", "tv", path),
        stdin=chart(bits, grey=transfer == "hlg").tobytes(),
    )
    _, (frame,) = read(path)
    assert frame.planes.hdr.transfer == transfer
    ours = reduced_rgb(frame.planes, longest_px=size)[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    light = np.clip(light_by_zimg(path, transfer), 0, 1000)
    mapped = np.vectorize(lambda value: reference.eetf(value, 1000.0))(light)
    wanted = np.clip(mapped @ reference.TO_709.T / reference.WHITE, 0, 1)
    step = 2.4 * np.maximum(wanted, 1e-3) ** (1.4 / 2.4) / 255  # one of 8 bits, in linear light
    off = np.abs((ours / 255.0) ** 2.4 - wanted)
    assert np.all(off <= 0.6 * step + 5e-4)
    assert np.ptp(ours.reshape(-1, 3), axis=0).min() > 250


# The way to a score ---------------------------------------------------------------------------


def test_a_score_of_hdr_is_marked(tmp_path, run_cli):
    """What is tone mapped keeps its mark, in messages and as out of domain."""
    path = make_one(tmp_path / "clip.mp4", hevc(PQ), size=(160, 96))
    done = run_cli("score", path, "-f", "ndjson", "-q")
    assert done.code == 0, done
    shown = [json.loads(line) for line in done.out.splitlines()]
    assert {(m["dynamic_range"], m["in_domain"]) for m in shown} == {("pq", False)}


def with_dolby_vision(path, target, profile, compatibility):
    """The file with a Dolby Vision configuration, as if its samples were of that profile."""
    record = struct.pack(">BBHB19x", 1, 0, profile << 9 | 5 << 3 | 0b101, compatibility << 4)
    box = struct.pack(">I4s", 8 + len(record), b"dvcC") + record
    content = bytearray(path.read_bytes())
    assert content.index(b"mdat") < content.index(b"moov")  # no offset of samples moves
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hvc1"):
        at = content.index(name, content.index(b"moov")) - 4
        (size,) = struct.unpack_from(">I", content, at)
        struct.pack_into(">I", content, at, size + len(box))
    content[at + size : at + size] = box
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("parameters", ["colorprim=undef", PQ], ids=["untagged", "tagged"])
def test_dolby_vision_without_a_base_layer_is_flagged(tmp_path, caplog, parameters):
    """IPT samples (profile 5) are marked as PQ, left as they are and told of, tagged or not."""
    plain = make_one(tmp_path / "clip.mp4", hevc(parameters), size=(160, 96))
    path = with_dolby_vision(plain, tmp_path / "five.mp4", 5, 0)
    with caplog.at_level(logging.WARNING):
        _, frames = read(path)
    assert {(f.planes.hdr, f.info.dynamic_range) for f in frames} == {(None, "pq")}
    assert packed(frames) == raw(plain, "yuv420p10le")
    assert "Dolby Vision profile 5" in caplog.text


@pytest.mark.parametrize(("compatibility", "tags", "wanted"), [(1, PQ, "pq"), (4, HLG, "hlg")])
def test_dolby_vision_with_a_base_layer_is_tone_mapped(
    tmp_path, caplog, compatibility, tags, wanted
):
    """Profiles 8.1 and 8.4 are PQ and HLG like any other, and nothing is told."""
    plain = make_one(tmp_path / "clip.mp4", hevc(tags), size=(160, 96))
    path = with_dolby_vision(plain, tmp_path / "eight.mp4", 8, compatibility)
    with caplog.at_level(logging.WARNING):
        _, frames = read(path)
    assert {f.planes.hdr.transfer for f in frames} == {wanted}
    assert "Dolby" not in caplog.text
