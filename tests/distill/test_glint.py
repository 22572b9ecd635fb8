"""The GlintIQA-style teacher: shapes, what each part computes, and what it does not look at."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from dgiqa_stream.errors import ConfigError  # noqa: E402
from distill.models.glint import (  # noqa: E402
    ChannelSelfAttention,
    GlintConfig,
    GlintIQA,
    SpatialEnhancement,
)

WIDTH = 24
SMALL = GlintConfig(
    vit="vit_tiny_patch16_224",
    cnn="test_resnet",
    picture_px=64,
    vit_options={"depth": 6, "embed_dim": WIDTH, "num_heads": 3},
)


@pytest.fixture(scope="module")
def teacher():
    """A teacher of 64-pixel pictures with a ViT of six narrow blocks, with random weights."""
    torch.manual_seed(1)
    return GlintIQA(SMALL).eval()


@pytest.fixture(scope="module")
def picture():
    """Two normalised pictures."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def test_a_picture_has_score_map_and_vector(teacher, picture):
    """64 px in patches of 16 give a 4x4 map, its mean the vector, and a score within 0..1."""
    with torch.no_grad():
        found = teacher.describe(picture)
    assert found.score.shape == (2,)
    assert found.fused.shape == (2, WIDTH, 4, 4)
    assert ((found.score > 0) & (found.score < 1)).all()
    torch.testing.assert_close(found.pooled, found.fused.mean((2, 3)))


def test_depth_is_not_read(teacher, picture):
    """The score is the same without depth and with a depth map of noise."""
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(picture), teacher(picture, torch.rand(2, 1, 64, 64)), rtol=0, atol=0
        )


@pytest.mark.parametrize("first", [0, 2])
def test_tokens_are_those_of_four_consecutive_blocks(first, picture):
    """What is read equals the ViT's own blocks, run one after the other from the patches."""
    torch.manual_seed(3)
    options = {"depth": 6, "embed_dim": WIDTH, "num_heads": 3}
    config = GlintConfig(
        vit=SMALL.vit, cnn=SMALL.cnn, picture_px=64, first_block=first, vit_options=options
    )
    wide = GlintIQA(config).eval().wide
    with torch.no_grad():
        found = wide(picture)
        x = wide.vit._pos_embed(wide.vit.patch_embed(picture))
        expected = []
        for block in wide.vit.blocks:
            x = block(x)
            expected.append(x[:, 1:])  # the class token is left out
    assert len(found) == 4
    for mine, theirs in zip(found, expected[first : first + 4], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_last_four_blocks_are_taken_unless_told(teacher):
    """Of six blocks those from index 2 on are read."""
    assert teacher.wide.blocks == [2, 3, 4, 5]


def test_local_maps_reach_the_grid_by_their_strides(teacher, picture):
    """Stages at strides 4, 8, 16 are embedded by kernels of 4, 2, 1, each a linear map of what
    lies under one patch.
    """
    local = teacher.local
    assert [e.kernel_size for e in local.embed] == [(4, 4), (2, 2), (1, 1)]
    assert [e.stride for e in local.embed] == [(4, 4), (2, 2), (1, 1)]
    with torch.no_grad():
        stage = local.cnn(picture)[0]  # (2, C, 16, 16)
        under_patch = stage[1, :, 4:8, 8:12].flatten()  # second row, third column
        embed = local.embed[0]
        expected = embed.weight.flatten(1) @ under_patch + embed.bias
        torch.testing.assert_close(local(picture)[0][1, 1 * 4 + 2], expected)


def test_channels_attend_to_channels():
    """CWSA equals its formula written as loops over channels."""
    torch.manual_seed(4)
    attend = ChannelSelfAttention(3, num_inputs=2)
    a, b = torch.randn(2, 1, 5, 3)
    with torch.no_grad():
        x = attend.merge(torch.cat([a, b], -1))[0]
        q, k, v = attend.to_qkv(attend.norm(x)).chunk(3, -1)
        expected = x.clone()
        for i in range(3):
            share = torch.stack([q[:, i] @ k[:, j] / 5**0.5 for j in range(3)]).softmax(0)
            expected[:, i] += sum(share[j] * v[:, j] for j in range(3))
        torch.testing.assert_close(attend(a, b)[0], expected)


def test_channel_attention_does_not_know_positions():
    """Shuffling the tokens of both inputs shuffles CWSA's output alike; SEM's output changes."""
    torch.manual_seed(5)
    attend, enhance = ChannelSelfAttention(8, num_inputs=2), SpatialEnhancement(8)
    a, b = torch.randn(2, 2, 9, 8)
    order = torch.randperm(9)
    with torch.no_grad():
        torch.testing.assert_close(attend(a[:, order], b[:, order]), attend(a, b)[:, order])
        shuffled = enhance(a[:, order], grid=(3, 3))
        assert (shuffled - enhance(a, grid=(3, 3))[:, order]).abs().max() > 1e-3


def test_every_weight_takes_part(picture):
    """Each parameter receives a gradient from the scores: no part of the teacher is idle."""
    torch.manual_seed(6)
    model = GlintIQA(SMALL).train()
    for module in model.modules():  # timm begins residual branches at zero
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    model(picture).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert idle == []


def test_weights_can_be_kept(teacher, picture, tmp_path):
    """A second teacher filled from the first one's file scores the same."""
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    torch.manual_seed(7)
    other = GlintIQA(SMALL).eval()
    with torch.no_grad():
        assert not torch.equal(other(picture), teacher(picture))
        other.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
        torch.testing.assert_close(other(picture), teacher(picture), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vit": "vit_of_dreams"}, "vit_of_dreams"),
        ({"cnn": "no_such_net"}, "no_such_net"),
        ({"vit": "test_resnet", "vit_options": {}}, "test_resnet is no ViT"),
        ({"first_block": 3}, r"first_block 3 .* 0\.\.2"),
        ({"picture_px": 72}, "72 is no multiple"),
        ({"vit": "vit_small_patch8_224"}, "patches of 8 px"),
    ],
)
def test_parts_that_do_not_fit_are_named(changed, words):
    """Unknown models, a block out of range and an unsuited patch each end in one clear error."""
    values = {name: getattr(SMALL, name) for name in GlintConfig.__slots__}
    with pytest.raises(ConfigError, match=words):
        GlintIQA(GlintConfig(**{**values, **changed}))


def test_a_picture_of_another_size_is_refused(teacher):
    """A 96-pixel batch is refused with both shapes."""
    with pytest.raises(ValueError, match=r"\(1, 3, 96, 96\).*64, 64"):
        teacher(torch.zeros(1, 3, 96, 96))
