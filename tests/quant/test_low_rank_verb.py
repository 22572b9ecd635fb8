"""Factoring whole models: ranks and budgets, attention, BatchNorm, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from dgiqa_stream.errors import ConfigError, ModelError  # noqa: E402
from quant.low_rank.attention import SplitAttention  # noqa: E402
from quant.low_rank.batchnorm import reestimate_batchnorm_  # noqa: E402
from quant.low_rank.config import (  # noqa: E402
    LowRankConfig,
    LowRankRecipe,
    load_low_rank_recipe,
)
from quant.low_rank.factorize import factorize_  # noqa: E402
from quant.low_rank.layers import shape_like_  # noqa: E402
from quant.low_rank.ranks import Option, choose  # noqa: E402
from quant.low_rank.sensitivity import latency_seconds  # noqa: E402

WIDTH = 32


class Net(nn.Module):
    """A convolution, attention and layers, one of which hardly matters and one is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1)
        self.wide = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.attend = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.minor, self.major = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64)
        self.last = nn.Linear(64, 1)
        self.unused = nn.Linear(64, 64)

    def forward(self, x):
        """(B, 3, H, W) to (B,)."""
        y = torch.relu(self.norm(self.stem(x)))
        y = self.wide(self.depthwise(y)).flatten(2).transpose(1, 2)
        y = y + self.attend(y, y, y, need_weights=False)[0]
        return torch.sigmoid(self.last(self.major(y) + 0.01 * self.minor(y)).mean((1, 2)))


@pytest.fixture
def net():
    """A drawn network."""
    torch.manual_seed(3)
    made = Net().eval()
    with torch.no_grad():
        made.last.weight *= 10
    return made


@pytest.fixture(scope="module")
def batches():
    """Three batches of four pictures."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator),) for _ in range(3)]


def state_of(model) -> dict:
    """A copy of everything a model holds."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_untouched(model, state) -> None:
    """A model holds what it held."""
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], state[name]) for name in now)


def test_splitting_attention_changes_nothing(batches):
    """Split attention gives torch's own answers and weights: cross and self, either layout, keys of
    another width, without bias.
    """
    for arguments in ({}, {"batch_first": True}, {"kdim": 12, "vdim": 20}, {"bias": False}):
        torch.manual_seed(1)
        source = nn.MultiheadAttention(16, 4, **arguments).eval()
        mine = SplitAttention(source)
        q = torch.randn(5, 7, 16)
        k, v = torch.randn(5, 7, source.kdim), torch.randn(5, 7, source.vdim)
        for needed in (True, False):
            want, told = source(q, k, v, need_weights=needed)[0], mine(q, k, v, need_weights=needed)
            assert (told[0] - want).abs().max() < 1e-6  # float32, two orders of adding
        weights = source(q, k, v)[1], mine(q, k, v)[1]
        assert (weights[0] - weights[1]).abs().max() < 1e-6


def test_masks_are_refused():
    """Factored attention says that it knows no masks rather than ignoring one."""
    mine = SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.zeros(1, 3, 8)
    with pytest.raises(ModelError, match="no masks"):
        mine(x, x, x, key_padding_mask=torch.zeros(1, 3, dtype=torch.bool))


def test_projections_of_attention_have_ranks_of_their_own(net, batches):
    """Query, key, value and output are factored one by one; what the config leaves out is whole."""
    config = LowRankConfig(choice="fixed", rank=8, include=("attend.q", "attend.v"))
    report = factorize_(net, config, batches)
    assert report.ranks == {"attend.q": (8,), "attend.v": (8,)}
    assert isinstance(net.attend.k, nn.Linear)
    assert isinstance(net.attend.q, nn.Sequential)


def test_an_attention_that_stays_whole_is_torchs_again(net, batches):
    """Where no projection is factored nn.MultiheadAttention is back, with its parameters."""
    config = LowRankConfig(choice="fixed", rank=8, include=("major",))
    factorize_(net, config, batches)
    assert type(net.attend) is nn.MultiheadAttention


def test_energy_keeps_what_it_says(net, batches):
    """More energy never gives a smaller rank, and all of it an output that errs by rounding."""
    ranks = []
    for energy in (0.3, 0.6, 0.9):
        copy = Net()
        copy.load_state_dict(net.state_dict())
        config = LowRankConfig(energy=energy, include=("major", "wide"), multiple=1)
        report = factorize_(copy, config, batches)
        ranks.append([report.ranks.get(n, (99, 99)) for n in ("major", "wide")])
        done = [layer for layer in report.layers if layer.kind == "linear" and layer.rank]
        assert all(layer.weighted_error <= (1 - energy) ** 0.5 + 1e-9 for layer in done)
    for fewer, more in pairwise(ranks):
        assert all(low <= high for low, high in zip(fewer, more, strict=True))


@pytest.mark.parametrize("budget", ["max_parameters", "max_macs"])
def test_a_search_meets_its_budget_where_it_hurts_least(net, batches, budget):
    """The budget holds as measured on the changed model, and of two equal layers the one that the
    score hardly reads is cut first.
    """
    whole = factorize_(Net().eval(), LowRankConfig(choice="fixed", rank=99), batches)
    now = whole.num_parameters_before if budget == "max_parameters" else whole.macs_before
    config = LowRankConfig(
        choice="sensitivity", include=("major", "minor"), multiple=4, **{budget: int(0.97 * now)}
    )
    report = factorize_(net, config, batches)
    after = report.num_parameters_after if budget == "max_parameters" else report.macs_after
    assert after <= 0.97 * now
    assert report.num_parameters_after == sum(p.numel() for p in net.parameters())
    assert "minor" in report.ranks
    assert report.ranks.get("major", (99,)) > report.ranks["minor"]


def test_a_latency_budget_is_searched_by_measured_times():
    """Times of layers decide: with a third of its time as the budget a slow layer is cut.

    Cut, the model takes about an eighth of its time: other processes may change what is measured
    by more than a factor of two between the budget and the search.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 1)).eval()
    x = torch.randn(256, 768)
    limit = 0.35 * min(latency_seconds(lambda: model(x)) for _ in range(5))
    config = LowRankConfig(choice="sensitivity", max_latency_seconds=limit, rank_shares=(0.1,))
    assert list(factorize_(model, config, [(x,)]).ranks) == ["0"]


def test_a_search_takes_the_cheapest_damage_first():
    """Greedy by damage for each unit saved, jumping over options that are no good."""
    options = {
        "a": [Option(None, 100.0), Option((8,), 60.0, 4.0), Option((4,), 20.0, 4.4)],
        "b": [Option(None, 100.0), Option((8,), 50.0, 1.0), Option((4,), 10.0, 90.0)],
    }
    for limit, want in ((160.0, {"b": (8,)}), (100.0, {"a": (4,), "b": (8,)}), (200.0, {})):
        config = LowRankConfig(choice="sensitivity", max_macs=int(limit))
        assert choose(options, 200.0, config) == want


def test_batchnorms_learn_the_changed_network(net, batches):
    """New statistics are the mean and unbiased variance over all batches of what it reads."""
    x = torch.cat([b[0] for b in batches])
    with torch.no_grad():
        net.stem.weight *= 3
        read = net.stem(x).transpose(0, 1).flatten(1)
    assert reestimate_batchnorm_(net, batches) == 1
    assert torch.allclose(net.norm.running_mean, read.mean(1), atol=1e-5)
    assert torch.allclose(net.norm.running_var, read.var(1), rtol=1e-4)
    assert not net.norm.training
    assert net.norm.momentum == 0.1


def test_a_batch_of_one_value_cannot_teach_a_batchnorm(batches):
    """Statistics of single values are refused with what to do."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(ValueError, match="batches of several pictures"):
        reestimate_batchnorm_(model, [(torch.zeros(1, 4),)])


def test_modes_come_back(net, batches):
    """A model in training is in training afterwards, with the new layers; frozen parts stay so."""
    net.train()
    net.norm.eval()
    factorize_(net, LowRankConfig(choice="fixed", rank=8, reestimate_batchnorm=False), batches)
    assert net.training
    assert net.wide[0].training
    assert not net.norm.training


def test_a_factored_shape_takes_the_factored_weights(net, batches):
    """A fresh model brought to the reported ranks loads the state and gives the same bits."""
    report = factorize_(net, LowRankConfig(choice="fixed", rank=8), batches)
    other = Net().eval()
    shape_like_(other, report.ranks)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(batches[0][0]), net(batches[0][0]))


def test_layers_left_alone_have_a_reason(net, batches):
    """Depthwise layers do not pay, a layer that never ran is told, a shared one is not touched."""
    report = factorize_(net, LowRankConfig(choice="fixed", rank=8), batches)
    reasons = {layer.name: layer.reason for layer in report.layers if layer.rank is None}
    assert reasons["depthwise"] == "does not pay at its size"
    assert reasons["unused"] == "not reached by calibration data"
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    told = factorize_(model, LowRankConfig(choice="fixed", rank=8), [(torch.randn(9, 64),)])
    assert told.layers == ()


@pytest.mark.parametrize("empty", [[], [(torch.zeros(0, 3, 8, 8),)], [()]])
def test_calibration_must_hold_something(net, empty):
    """No batches, an empty batch and a batch of no arguments are one clear error."""
    with pytest.raises(ValueError, match="needs calibration data"):
        factorize_(net, LowRankConfig(), empty)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_must_be_numbers(net, value):
    """One pixel that is no number is refused, and the model is as it was."""
    state, x = state_of(net), torch.zeros(2, 3, 8, 8)
    x[1, 2, 3, 4] = value
    with pytest.raises(ModelError, match="not finite numbers"):
        factorize_(net, LowRankConfig(), [(x,)])
    assert_untouched(net, state)


def test_an_impossible_budget_is_refused(net, batches):
    """The budget, what could be reached and what to do are named; the model is as it was."""
    state = state_of(net)
    config = LowRankConfig(choice="sensitivity", max_parameters=1000)
    with pytest.raises(ConfigError, match=r"max_parameters 1000 cannot be met.*is left of"):
        factorize_(net, config, batches)
    assert_untouched(net, state)
    assert type(net.attend) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("include", "error", "message"),
    [
        ("norm", ModelError, "norm is a BatchNorm2d and cannot be factored"),
        ("attend.out_proj", ConfigError, r"matches no module.*did you mean attend\.out"),
        ("majr", ConfigError, "matches no module of the model; did you mean major"),
    ],
)
def test_a_name_that_cannot_be_factored_is_refused(net, batches, include, error, message):
    """A layer of another kind and a misspelt one are named; the model is as it was."""
    state = state_of(net)
    with pytest.raises(error, match=message):
        factorize_(net, LowRankConfig(include=(include,)), batches)
    assert_untouched(net, state)


def test_a_misspelt_exclusion_is_refused(net, batches):
    """A pattern that excludes nothing is named rather than ignored."""
    with pytest.raises(ConfigError, match="exclude 'majr' matches no module"):
        factorize_(net, LowRankConfig(exclude=("majr",)), batches)


def test_statistics_come_back_where_scoring_fails(net, batches):
    """An error after BatchNorms were re-estimated leaves model and statistics as they were."""
    state = state_of(net)

    def score(model, x):
        if isinstance(model.major, nn.Sequential):
            raise KeyboardInterrupt
        return model(x)

    config = LowRankConfig(choice="fixed", rank=8, include=("major", "stem", "wide"))
    with pytest.raises(KeyboardInterrupt):
        factorize_(net, config, batches, score=score)
    assert_untouched(net, state)


def test_tokens_without_a_batch_are_refused():
    """Tokens (N, C) are told to be of another shape."""
    mine = SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.zeros(3, 8)
    with pytest.raises(ModelError, match=r"takes \(B, N, C\)"):
        mine(x, x, x)


def test_a_folder_is_no_recipe(tmp_path):
    """A folder in place of a file is one clear error."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_low_rank_recipe(tmp_path)


class ReadsWeights(nn.Module):
    """A module that looks into its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        """(B, 32) to (B,)."""
        return (x @ self.layer.weight.T).mean(1) + self.layer(x).mean(1)


def test_a_layer_whose_weights_are_read_is_refused():
    """A parent that reads weights itself would break; it is told which, and nothing is changed."""
    model = ReadsWeights().eval()
    state = state_of(model)
    config = LowRankConfig(choice="fixed", rank=4)
    with pytest.raises(ModelError, match="reads the weights of a layer itself"):
        factorize_(model, config, [(torch.randn(5, 32),)])
    assert_untouched(model, state)


def test_an_output_that_is_no_score_needs_one():
    """A model that gives two tensors is refused unless told which is the score."""

    class Two(nn.Module):
        def forward(self, x):
            return x, x.mean(1)

    model = nn.Sequential(nn.Linear(32, 32), Two()).eval()
    x = [(torch.randn(6, 32),)]
    config = LowRankConfig(choice="fixed", rank=4)
    with pytest.raises(ModelError, match="give score="):
        factorize_(model, config, x)
    assert factorize_(model, config, x, score=lambda m, x: m(x)[1]).ranks == {"0": (4,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[low_rank]\nenergi = 0.9", "unknown field `energi`"),
        ("[lowrank]\nenergy = 0.9", "unknown field `lowrank`"),
        ("[low_rank]\nenergy = 1.2", "<= 1"),
        ("[low_rank]\nchoice = 'sensitivity'", "has 0 budgets and needs one"),
        ("[low_rank]\nmax_macs = 9", "only 'sensitivity' has a budget"),
        ("[low_rank]\ninclude = []", "must name something"),
        ("energy = ", "Invalid value"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(tmp_path, text, message):
    """Unknown keys, values off their range and budgets without a use are refused by name."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_low_rank_recipe(path)


def test_an_empty_recipe_is_the_defaults(tmp_path):
    """An empty file gives the defaults, which survive their history's form."""
    path = tmp_path / "recipe.toml"
    path.write_text("")
    found = load_low_rank_recipe(path)
    assert found == LowRankRecipe()
    assert msgspec.convert(msgspec.to_builtins(found), LowRankRecipe) == found
    with pytest.raises(ConfigError, match="no recipe at"):
        load_low_rank_recipe(tmp_path / "none.toml")
