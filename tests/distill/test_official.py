"""Teachers from files: published names of every release, one conversion, errors that name keys."""

from __future__ import annotations

import os
import pickle
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

from dgiqa_stream.errors import ConfigError, ModelError  # noqa: E402
from distill.models import official  # noqa: E402
from distill.models.official import (  # noqa: E402
    convert_official,
    load_official,
    official_names,
    open_teacher,
)
from distill.models.teacher import Dgiqa, TeacherSpec  # noqa: E402
from distill.models.teacher_file import read_about, save_teacher  # noqa: E402

SMALL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def swin():
    """A teacher at its published size, random."""
    torch.manual_seed(7)
    return Dgiqa().eval()


@pytest.fixture
def tiny_spec(monkeypatch):
    """Published checkpoints are tiny, on a tiny backbone, for the length of a test."""
    widths = {"bridge_channels": (16, 16, 16, 16), "num_heads": 4, "pooled_channels": 32}
    monkeypatch.setattr(official, "TeacherSpec", lambda name, *rest: TeacherSpec(name, **widths))
    return TeacherSpec(SMALL, **widths)


@pytest.fixture
def tiny(tiny_spec):
    """A tiny teacher, random."""
    torch.manual_seed(8)
    return Dgiqa(tiny_spec).eval()


def older(state, *, timm08=False):
    """The same tensors under an earlier release's names, and an earlier timm's."""
    renamed = {}
    for key, tensor in state.items():
        key = key.replace("tcb", "tsb").replace("refinement_attention", "spatialattention")
        key = key.replace("depth_guided_cross_attention", "cross_spatialattention")
        if timm08:
            key = re.sub(
                r"layers_(\d)\.downsample", lambda m: f"layers_{int(m[1]) - 1}.downsample", key
            )
        renamed[key.replace("layers_", "layers.")] = tensor
    return renamed


def same(first, second):
    """Whether two models hold equal tensors under equal names."""
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_published_checkpoint_loads_strictly_and_is_converted_once(swin, tmp_path, capfd):
    """A .pth of 482 tensors under the published names, wrapped as DataParallel saves them, gives
    every tensor back; a second load takes the conversion, in which the source's name, size and
    sha256 stand, and gives the same.
    """
    path = tmp_path / "koniq.pth"
    torch.save({f"module.{k}": v for k, v in swin.state_dict().items()}, path)
    assert same(load_official(path), swin)
    assert "koniq.safetensors" in capfd.readouterr().err
    about = read_about(tmp_path / "koniq.safetensors")
    assert about.source_name == "koniq.pth"
    assert about.source_bytes == path.stat().st_size
    assert about.spec == TeacherSpec()
    assert same(load_official(path), swin)
    assert capfd.readouterr().err == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["koniq.pth", "koniq.safetensors"]


@pytest.mark.parametrize("timm08", [False, True])
def test_names_of_earlier_releases_are_the_published_ones(swin, timm08):
    """Modules named tsb*, cross_spatialattention and spatialattention, stages named layers.N,
    downsampling where timm 0.8 had it, and tables that timm stored then, map to the 482 names.
    """
    state = swin.state_dict()
    old = older(state, timm08=timm08)
    assert not old.keys() <= state.keys()
    old["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    old["depth_backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    named = official_names(old)
    assert named.keys() == state.keys()
    assert all(named[key] is state[key] for key in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"model_state_dict": older(state)},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    ],
)
def test_wrapped_state_dicts_load(tiny, tmp_path, wrap):
    """A bare state dict and one under the usual keys and prefixes give the same tensors."""
    torch.save(wrap(tiny.state_dict()), tmp_path / "t.pth")
    assert same(load_official(tmp_path / "t.pth", backbone=SMALL), tiny)


def test_a_changed_checkpoint_is_converted_again(tiny, tmp_path):
    """A conversion of other content is not taken, even when it is younger; nor one that is older
    than its source.
    """
    path, beside = tmp_path / "t.pth", tmp_path / "t.safetensors"
    torch.save(tiny.state_dict(), path)
    load_official(path, backbone=SMALL)
    with torch.no_grad():
        tiny.fc.bias.add_(1)
    torch.save(tiny.state_dict(), path)
    os.utime(path, ns=(0, 0))
    assert same(load_official(path, backbone=SMALL), tiny)
    os.utime(beside, ns=(0, 0))
    os.utime(path)
    load_official(path, backbone=SMALL)
    assert beside.stat().st_mtime_ns > 0


def test_a_strangers_safetensors_is_left_alone(tiny, tmp_path, capfd):
    """A file of the conversion's name that is no conversion is not read and not written over."""
    from safetensors.torch import save_file

    path, beside = tmp_path / "t.pth", tmp_path / "t.safetensors"
    torch.save(tiny.state_dict(), path)
    save_file({"x": torch.zeros(3)}, beside)
    before = beside.read_bytes()
    assert same(load_official(path, backbone=SMALL), tiny)
    assert beside.read_bytes() == before
    assert "left as it is" in capfd.readouterr().err


def test_keys_that_do_not_fit_are_named_and_counted(tiny, tmp_path):
    """Missing, unknown and wrongly shaped tensors are counted, the first few named with shapes, and
    the next step told; nothing is converted.
    """
    state = tiny.state_dict()
    for key in [k for k in state if k.startswith("tcb1.")]:
        del state[key]
    state["head.weight"] = torch.zeros(3)
    state["fc.weight"] = torch.zeros(1, 7)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(ModelError) as caught:
        load_official(tmp_path / "t.pth", backbone=SMALL)
    told = str(caught.value)
    assert re.search(r"13 tensors missing \(tcb1\.attention\.0\.bias, .*, …\)", told)
    assert "1 tensor unknown (head.weight)" in told
    assert "1 tensor of another shape (fc.weight (1, 7) where (1, 32) is needed)" in told
    assert "--backbone" in told
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tiny, tmp_path, value):
    """One value of one tensor that is no finite number: ``convert``, the loader of a ``.pth`` and
    that of a teacher's own file name file and tensor, and nothing is written.
    """
    state = tiny.state_dict()
    state["fc.weight"][0, 3] = value
    torch.save(state, tmp_path / "t.pth")
    words = r"t\.\w+ is spoilt: 1 tensor with NaN or infinity \(fc\.weight\)"
    with pytest.raises(ModelError, match=words):
        convert_official(tmp_path / "t.pth", tmp_path / "out.safetensors", backbone=SMALL)
    with pytest.raises(ModelError, match=words):
        load_official(tmp_path / "t.pth", backbone=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["t.pth"]
    tiny.load_state_dict(state)
    save_teacher(tiny, tmp_path / "t.safetensors", version="1")
    with pytest.raises(ModelError, match=words):
        open_teacher(tmp_path / "t.safetensors")


class Loud:
    """Something whose loading would run code."""

    def __reduce__(self):
        """Ask for a call on loading."""
        return print, ("ran",)


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (lambda path: path.write_bytes(b"no checkpoint"), "tensors alone"),
        (lambda path: path.write_bytes(pickle.dumps({"x": Loud()}, 2)), "could run code"),
        (lambda path: torch.save({"x": Loud()}, path), "could run code"),
        (lambda path: torch.save([torch.zeros(3)], path), "no state dict"),
        (lambda path: torch.save({"epoch": 3}, path), "no state dict"),
        (lambda path: path.write_bytes(b""), "tensors alone"),
    ],
)
def test_what_is_no_checkpoint_is_one_error(tmp_path, capfd, write, word):
    """Other bytes, other values and pickles that would run code are ModelErrors of one line that
    name the file, and nothing runs.
    """
    path = tmp_path / "t.pth"
    write(path)
    with pytest.raises(ModelError, match=word) as caught:
        load_official(path)
    assert "t.pth" in str(caught.value)
    assert "ran" not in capfd.readouterr().out


def test_a_teacher_tells_what_it_is(tmp_path):
    """A saved teacher of its own widths and backbone opens with those, its version and tensors."""
    torch.manual_seed(9)
    spec = TeacherSpec("resnet10t", (8, 8, 8, 8), 2, 16)
    made = Dgiqa(spec).eval()
    path = tmp_path / "deep" / "t.safetensors"
    save_teacher(made, path, version="0.2.0")
    opened = open_teacher(path, backbone="resnet10t")
    assert same(opened.model, made)
    assert opened.model.spec == spec
    assert not opened.model.training
    assert opened.version == "0.2.0"
    assert opened.size_bytes == path.stat().st_size
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ConfigError, match="of backbone resnet10t, not mobilenetv2"):
        open_teacher(path, backbone="mobilenetv2")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_a_broken_safetensors_is_one_error(tmp_path, content):
    """Bytes that are no safetensors end in a ModelError naming the file."""
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"t\.safetensors"):
        open_teacher(tmp_path / "t.safetensors")


def test_tensors_without_a_name_card_are_refused(tmp_path):
    """A safetensors that does not say that it is a teacher names the command that converts."""
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "t.safetensors")
    with pytest.raises(ModelError, match="dgiqa-distill convert"):
        open_teacher(tmp_path / "t.safetensors")


def test_nothing_half_written_is_left(tiny, tmp_path):
    """Where writing fails, neither the file nor a part of it remains."""
    target = tmp_path / "taken"
    target.mkdir()
    (target / "x").touch()
    with pytest.raises(OSError, match="taken"):
        save_teacher(tiny, target, version="0")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
