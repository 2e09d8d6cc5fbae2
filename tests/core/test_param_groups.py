"""From a model to parameter groups."""

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from resnet_reg_ext import ProxSGD, param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))


def split(groups):
    """Names of regularised and unregularised parameters."""
    names = {True: [], False: []}
    for group in groups:
        names[group["l1"] > 0 or group["weight_decay"] > 0] += [n for n, _ in group["params"]]
    return names[True], names[False]


def test_norms_and_biases_are_unregularised():
    model = Net()
    groups = param_groups(model, l1=0.25, weight_decay=0.5)
    assert split(groups) == (
        ["conv.weight", "head.0.weight", "head.2.weight"],
        ["conv.bias", "bn.weight", "bn.bias", "head.0.bias", "head.1.weight", "head.1.bias"],
    )
    assert [(g["l1"], g["weight_decay"]) for g in groups] == [(0.25, 0.5), (0.0, 0.0)]
    by_name = dict(model.named_parameters())
    for group in groups:
        for name, p in group["params"]:
            assert p is by_name[name]


def test_defaults_are_the_optimizers():
    groups = param_groups(Net())
    defaults = ProxSGD([nn.Parameter(torch.ones(1))]).defaults
    for key in ("l1", "weight_decay"):
        assert groups[0][key] == defaults[key]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.SyncBatchNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_kinds_of_norms(norm):
    regularised, unregularised = split(param_groups(nn.Sequential(nn.Linear(4, 4), norm)))
    assert regularised == ["0.weight"]
    assert "1.weight" in unregularised


def test_other_biases():
    lstm, attention = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)
    regularised, unregularised = split(param_groups(lstm))
    assert set(regularised) == {"weight_ih_l0", "weight_hh_l0"}
    assert set(unregularised) == {"bias_ih_l0", "bias_hh_l0"}
    _, unregularised = split(param_groups(attention))
    assert set(unregularised) == {"in_proj_bias", "out_proj.bias"}


@pytest.mark.parametrize(
    ("patterns", "moved"),
    [
        (["conv.weight"], {"conv.weight"}),
        (["head.*"], {"head.0.weight", "head.2.weight"}),
        (["*.weight"], {"conv.weight", "head.0.weight", "head.2.weight"}),
        (["head.[0-1].weight", "conv.*"], {"conv.weight", "head.0.weight"}),
        (["bn.bias"], set()),
        ("head.*", {"head.0.weight", "head.2.weight"}),
    ],
    ids=["name", "layer", "leaf", "several", "unregularised anyway", "one string"],
)
def test_exclude(patterns, moved):
    before, _ = split(param_groups(Net()))
    regularised, unregularised = split(param_groups(Net(), exclude=patterns))
    assert set(before) - set(regularised) == moved
    assert moved <= set(unregularised)


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x):
        return x


class SumOfTwo(nn.Module):
    """A parametrization of two tensors, both of which are weights."""

    def forward(self, a, b):
        return a + b

    def right_inverse(self, weight):
        return weight / 2, weight / 2


def test_what_is_parametrized_is_what_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for module in model:
        for leaf in ("weight", "bias"):
            nn.utils.parametrize.register_parametrization(module, leaf, Same())
    regularised, unregularised = split(param_groups(model))
    assert regularised == ["0.parametrizations.weight.original"]
    assert len(unregularised) == 3


def test_a_parametrization_of_several_tensors():
    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", SumOfTwo())
    regularised, unregularised = split(param_groups(layer))
    assert unregularised == ["bias"]
    assert len(regularised) == 2


def test_one_parameter_under_two_names_of_one_module():
    layer = nn.Linear(3, 1)
    layer.weight = nn.Parameter(torch.ones(1))
    layer.bias = layer.weight
    assert split(param_groups(layer)) == ([], ["weight"])
    assert split(param_groups(layer, exclude="bias")) == ([], ["weight"])


def test_biases_are_told_by_a_word_not_by_letters():
    module = nn.Module()
    module.biased, module.bias_k = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    assert split(param_groups(module)) == (["biased"], ["bias_k"])


def test_patterns_from_a_generator():
    regularised, _ = split(param_groups(Net(), exclude=(p for p in ["conv.*", "head.*"])))
    assert regularised == []


@pytest.mark.parametrize("model", [list(Net().parameters()), Net().named_parameters()])
def test_parameters_alone_do_not_tell_what_they_are(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}: must be a module"):
        param_groups(model)


@pytest.mark.parametrize("pattern", ["fc.*", "conv", "CONV.weight", ""])
def test_exclude_that_matches_nothing(pattern):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        param_groups(Net(), exclude=["conv.weight", pattern])


@pytest.mark.parametrize("model", [nn.Module(), nn.Sequential(nn.ReLU())], ids=["empty", "relu"])
def test_no_parameters(model):
    with pytest.raises(ValueError, match="no parameters"):
        param_groups(model)


def test_one_group_where_the_other_is_empty():
    assert len(param_groups(nn.Linear(2, 2, bias=False))) == 1
    (group,) = param_groups(nn.BatchNorm1d(3))
    assert group["l1"] == group["weight_decay"] == 0.0


def test_every_parameter_once_frozen_ones_too():
    model = Net()
    model.conv.weight.requires_grad_(False)
    members = [p for g in param_groups(model) for _, p in g["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert any(p is model.conv.weight for p in members)


def test_frozen_parameter_stays_and_moves_when_unfrozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = ProxSGD(param_groups(model), lr=0.1)
    frozen = model[0].weight.detach().clone()

    def step():
        optimizer.zero_grad()
        model(torch.ones(3)).sum().backward()
        optimizer.step()

    step()
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_(True)
    step()
    assert not torch.equal(model[0].weight, frozen)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


def test_tied_parameters_are_there_once():
    (group,) = param_groups(Tied())
    assert [n for n, _ in group["params"]] == ["embedding.weight"]


@pytest.mark.parametrize("pattern", ["embedding.weight", "output.weight"])
def test_tied_parameters_are_excluded_by_either_name(pattern):
    (group,) = param_groups(Tied(), exclude=[pattern])
    assert group["l1"] == 0.0


def test_a_module_used_twice():
    layer = nn.Linear(3, 3)
    groups = param_groups(nn.Sequential(layer, nn.ReLU(), layer), exclude=["2.weight"])
    regularised, unregularised = split(groups)
    assert regularised == []
    assert unregularised == ["0.weight", "0.bias"]


def test_options_given_here_are_checked_by_the_optimizer():
    groups = param_groups(Net(), l1=-1.0)
    with pytest.raises(ValueError, match=re.escape("param_groups[0]: l1 is -1.0")):
        ProxSGD(groups)


def test_training_zeroes_only_what_is_regularised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.LayerNorm(20), nn.Linear(20, 1))
    optimizer = ProxSGD(param_groups(model, l1=0.05), lr=0.05)
    x = torch.randn(64, 10)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x)[:, 0] - x[:, 0]).square().mean().backward()
        optimizer.step()
    zeros = {n: int((p == 0).sum()) for n, p in model.named_parameters()}
    assert zeros["0.weight"] > 50
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        assert zeros[name] == 0


# ---------------------------------------------------------------------------------------------
# Scales, slopes and tokens


def holder(**shapes):
    """A module of a user's own, with parameters of these shapes."""
    module = nn.Module()
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.ones(shape)))
    return module


class ScaledConv2d(nn.Conv2d):
    """As timm's ScaledStdConv2d: a gain for each output channel, beside the weight."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (nn.PReLU(), []),
        (nn.PReLU(4), []),
        (holder(logit_scale=()), []),
        (holder(alpha=1), []),
        (holder(gamma_1=8, gain=(8, 1), layer_scale=(8, 1, 1), temperature=(1, 8, 1, 1)), []),
        (holder(cls_token=(1, 1, 8), query=(1, 8)), []),
        (holder(pos_embed=(1, 5, 8), pos_embed_2d=(1, 8, 5, 5)), []),
        (holder(qkv=(24, 8), kernel=(8, 1, 3, 3), experts=(2, 8, 8)), ["qkv", "kernel", "experts"]),
        (nn.ParameterList([torch.ones(3), torch.ones(3, 3)]), ["1"]),
        (ScaledConv2d(), ["weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_scales_slopes_and_tokens_are_told_by_their_shape(model, weights):
    regularised, _ = split(param_groups(model))
    assert regularised == weights


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(20, 1),
        nn.Linear(1, 20),
        nn.Linear(1, 1),
        OwnLinear(20, 1),
        nn.LazyLinear(3),
        nn.Conv1d(1, 1, 1),
        nn.Conv2d(8, 1, 3),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.LazyConv2d(8, 3),
        nn.ConvTranspose2d(1, 8, 1),
        nn.Embedding(5, 1),
        nn.EmbeddingBag(1, 5),
        nn.Bilinear(1, 1, 1),
        nn.LSTM(1, 1),
        nn.GRUCell(1, 1),
        nn.MultiheadAttention(1, 1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_weight_of_a_layer_is_regularised_in_any_shape(layer):
    regularised, unregularised = split(param_groups(layer))
    names = {name for name, _ in layer.named_parameters()}
    assert set(regularised) == {name for name in names if "weight" in name}
    assert set(unregularised) == {name for name in names if "bias" in name}


def test_include_overrides_the_rule_and_exclude_overrides_include():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU(4))
    regularised, _ = split(param_groups(model, include=["1.weight", "2.*"]))
    assert regularised == ["0.weight", "1.weight", "2.weight"]
    regularised, _ = split(param_groups(model, include="*", exclude=["*.bias", "0.weight"]))
    assert regularised == ["1.weight", "2.weight"]
    with pytest.raises(ValueError, match=re.escape("include matches no parameter: ['3.*']")):
        param_groups(model, include="3.*")


class Decides(nn.Module):
    """As a model of timm's: it says what gets no weight decay."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 3))
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def no_weight_decay(self):
        return {"table", "body.1.*"}


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_a_model_itself_names_is_unregularised(prefix):
    model = nn.ModuleDict({"backbone": Decides()}) if prefix else Decides()
    regularised, _ = split(param_groups(model))
    assert regularised == [f"{prefix}body.0.weight"]


def test_what_a_parameter_says_of_itself():
    """As Mamba's, whose A_log has two axes."""
    module = holder(A_log=(4, 3), weight=(4, 3))
    module.A_log._no_weight_decay = True
    assert split(param_groups(module)) == (["weight"], ["A_log"])


def torchvision_model(name):
    return pytest.importorskip("torchvision").models.get_model(name)


def timm_model(name):
    return pytest.importorskip("timm").create_model(name)


def hugging_face_model(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")()
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.one_torch
@pytest.mark.filterwarnings("ignore")  # of other people's programs
@pytest.mark.parametrize(
    ("make", "name", "leaves"),
    [
        (torchvision_model, "vit_b_16", {"class_token", "pos_embedding"}),
        (torchvision_model, "swin_v2_t", {"logit_scale"}),
        (timm_model, "edgenext_xx_small", {"temperature", "gamma"}),
        (timm_model, "resmlp_12_224", {"alpha", "beta", "ls1"}),
        (timm_model, "nfnet_f0", {"gain"}),
        (hugging_face_model, "CLIP", {"logit_scale", "class_embedding"}),
        (hugging_face_model, "Dinov2", {"lambda1", "cls_token", "position_embeddings"}),
        (hugging_face_model, "Wav2Vec2", {"original1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_of_others(make, name, leaves):
    """What is unregularised beside norms and biases, and that no matrix of a layer is."""
    with torch.device("meta"):
        model = make(name)
    regularised, unregularised = split(param_groups(model))
    assert leaves <= {name.split(".")[-1] for name in unregularised}
    layers = (nn.Linear, nn.Conv2d)
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, layers)}
    assert weights <= set(regularised)


class ReZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.linear(x).tanh()


def test_a_strong_l1_closes_no_branch():
    torch.manual_seed(0)
    model = nn.Sequential(ReZero(), nn.PReLU(10), ReZero(), nn.Linear(10, 1))
    optimizer = ProxSGD(param_groups(model, l1=0.02), lr=0.05)
    x = torch.randn(64, 10)
    for _ in range(100):
        optimizer.zero_grad()
        (model(x)[:, 0] - x[:, 0] * x[:, 1]).square().mean().backward()
        optimizer.step()
    zeros = {n: int((p == 0).sum()) for n, p in model.named_parameters()}
    assert zeros["0.linear.weight"] > 30
    assert zeros["0.alpha"] == zeros["2.alpha"] == zeros["1.weight"] == 0


# ---------------------------------------------------------------------------------------------
# Parametrizations that divide a parameter's length out


class UnitRows(nn.Module):
    """A user's own: every row has length 1."""

    def forward(self, v):
        return v / v.norm(dim=1, keepdim=True)


class OwnMagnitude(nn.Module):
    """A user's own weight norm, with the magnitude in the parametrization."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(4, 1))  # even where it makes every weight 0

    def forward(self, v):
        return self.g * nn.functional.normalize(v, dim=1)


class Standardised(nn.Module):
    """Weight standardisation."""

    def forward(self, v):
        return (v - v.mean(1, keepdim=True)) / (v.var(1, keepdim=True) + 1e-5).sqrt()


class OwnSpectralNorm(nn.Module):
    """With a power iteration at every evaluation, from where the last one has come to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("u", torch.ones(4))

    def forward(self, w):
        v = nn.functional.normalize(w.detach().t() @ self.u, dim=0)
        self.u.copy_(nn.functional.normalize(w.detach() @ v, dim=0))
        return w / (self.u @ w @ v)


class Sign(nn.Module):
    def forward(self, v):
        return v.sign()


def parametrized(*parametrizations, leaf="weight"):
    layer = nn.Linear(6, 4)
    for parametrization in parametrizations:
        parametrize.register_parametrization(layer, leaf, parametrization)
    return layer


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older way is deprecated
        return function(*arguments, **options)


ORIGINAL = "parametrizations.weight.original"
OLD_LSTM = ["bias_hh_l0", "bias_ih_l0", "weight_hh_l0_v"]


@pytest.mark.parametrize(
    ("make", "unregularised", "regularised"),
    [
        (
            lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=1),
            ["bias", f"{ORIGINAL}1"],
            [f"{ORIGINAL}0"],
        ),
        (
            lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None),
            ["bias", f"{ORIGINAL}1"],
            [f"{ORIGINAL}0"],
        ),
        (
            lambda: quietly(nn.utils.weight_norm, nn.LSTM(3, 4), "weight_hh_l0"),
            OLD_LSTM,
            ["weight_hh_l0_g", "weight_ih_l0"],
        ),
        (
            lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(3, 4, 3)),
            ["bias", ORIGINAL],
            [],
        ),
        (lambda: quietly(nn.utils.spectral_norm, nn.Conv1d(3, 4, 3)), ["bias", "weight_orig"], []),
        (lambda: parametrized(UnitRows()), ["bias", ORIGINAL], []),
        (lambda: parametrized(Same(), UnitRows(), Same()), ["bias", ORIGINAL], []),
        (lambda: parametrized(Standardised()), ["bias", ORIGINAL], []),
        (lambda: parametrized(OwnSpectralNorm()), ["bias", ORIGINAL], []),
        (lambda: parametrized(Sign()), ["bias", ORIGINAL], []),
        (
            lambda: parametrized(OwnMagnitude()),
            ["bias", "parametrizations.weight.0.g", ORIGINAL],
            [],
        ),
        (
            lambda: parametrizations.weight_norm(nn.Linear(6, 4)).half(),
            ["bias", f"{ORIGINAL}1"],
            [f"{ORIGINAL}0"],
        ),
    ],
    ids=[
        "weight norm, dim=1",
        "weight norm, dim=None",
        "older weight norm of an LSTM",
        "spectral norm",
        "older spectral norm",
        "unit rows",
        "unit rows between others",
        "weight standardisation",
        "own spectral norm",
        "sign",
        "own weight norm",
        "float16",
    ],
)
def test_what_a_parametrization_divides_out_is_unregularised(make, unregularised, regularised):
    found = split(param_groups(make()))
    assert tuple(map(sorted, found)) == (sorted(regularised), sorted(unregularised))


def test_include_takes_no_direction():
    """It would come to 0, and the weight to NaN."""
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    for pattern in ("*", "*original1"):
        assert f"{ORIGINAL}1" in split(param_groups(layer, include=pattern))[1]


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


class LowRank(nn.Module):
    """LoRA: the product is 0 at the start, whatever ``a`` is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, w):
        return w + self.b @ self.a


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.zeros(4, 6))

    def forward(self, w):
        return self.mask * w


@pytest.mark.parametrize(
    ("make", "regularised"),
    [
        (lambda: parametrized(Same()), [ORIGINAL]),
        (lambda: parametrized(nn.Softplus()), [ORIGINAL]),
        (lambda: parametrized(nn.Dropout(0.5)), [ORIGINAL]),
        (lambda: parametrized(Masked()), [ORIGINAL]),
        (
            lambda: parametrized(LowRank()),
            ["parametrizations.weight.0.a", "parametrizations.weight.0.b", ORIGINAL],
        ),
        (
            lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric()),
            [ORIGINAL],
        ),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), [ORIGINAL]),
        (lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5), ["weight_orig"]),
    ],
    ids=["same", "softplus", "dropout", "masked", "LoRA", "symmetric", "orthogonal", "pruned"],
)
def test_other_parametrizations_are_of_a_weight(make, regularised):
    assert sorted(split(param_groups(make()))[0]) == regularised


def test_a_parametrization_of_a_bias_or_of_a_norm_has_no_weights():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.factor @ x

    norm = nn.LayerNorm(4)
    parametrize.register_parametrization(norm, "weight", Product())
    model = nn.Sequential(parametrized(Product(), leaf="bias"), norm)
    assert split(param_groups(model))[0] == ["0.weight"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_trying_out_changes_nothing(device):
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 4)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrized(OwnSpectralNorm()),
        parametrized(nn.Dropout(0.5)),
    ).to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    _, unregularised = split(param_groups(model))
    assert {
        f"0.{ORIGINAL}",
        f"1.{ORIGINAL}1",
        f"2.{ORIGINAL}",
    } <= set(unregularised)
    assert torch.equal(torch.get_rng_state(), random_state)
    if device == "cpu":
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_a_parametrization_that_can_not_be_tried_out_is_told():
    class OnlyPositive(nn.Module):
        def forward(self, w):
            assert (w > 0).all()
            return w.log()

    layer = nn.Linear(6, 4)
    nn.init.constant_(layer.weight, 0.5)
    parametrize.register_parametrization(layer, "weight", OnlyPositive())
    message = r"can't tell whether parametrizations.weight is scale-invariant.*AssertionError"
    with pytest.warns(UserWarning, match=message) as caught:
        regularised, _ = split(param_groups(layer))
    assert regularised == [ORIGINAL]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["conv", "own"])
def test_training_under_a_strong_l1_stays_finite(kind):
    def wrap(layer):
        if kind == "conv":
            return parametrizations.weight_norm(layer)
        return parametrize.register_parametrization(layer, "weight", UnitRows())

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 20)), wrap(nn.Conv1d(1, 8, 5, stride=5)), nn.ReLU(), nn.Flatten())
        if kind == "conv"
        else (wrap(nn.Linear(20, 32)), nn.ReLU()),
        wrap(nn.Linear(32, 3)),
    )
    optimizer = ProxSGD(param_groups(model, l1=0.1), lr=0.1)
    x = torch.randn(100, 20)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(x).isfinite().all()
    if kind == "conv":
        magnitude = model[1].parametrizations.weight.original0
        assert (magnitude == 0).any()  # or L1 was too weak to show anything


def pretrained_net():
    return nn.Sequential(
        OrderedDict(
            [("conv", nn.Conv2d(3, 4, 3)), ("bn", nn.BatchNorm2d(4)), ("fc", nn.Linear(4, 2))]
        )
    )


def test_param_groups_pull_pretrained_weights_to_the_start_and_new_ones_to_zero():
    groups = param_groups(pretrained_net(), toward="start", new="fc.*", l1=0.1, weight_decay=0.2)
    optimizer = ProxSGD(groups)
    names = {
        (g["toward"], g["l1"], g["weight_decay"]): g["param_names"] for g in optimizer.param_groups
    }
    assert names == {
        ("start", 0.1, 0.2): ["conv.weight"],
        ("zero", 0.1, 0.2): ["fc.weight"],
        ("zero", 0.0, 0.0): ["conv.bias", "bn.weight", "bn.bias", "fc.bias"],
    }
    assert [g["l1"] for g in groups] == [0.1, 0.1, 0.0]  # the regularised ones first, as without
    for plain in param_groups(pretrained_net()):
        assert "toward" not in plain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"new": "fc.*"}, "new is 'fc.\\*' with toward='zero'.*needs toward='start'"),
        ({"toward": "start", "new": "head.*"}, "new matches no parameter: \\['head.\\*'\\]"),
        ({"toward": "here"}, "param_groups: toward is 'here': must be one of"),
    ],
    ids=["new without start", "no match", "another target"],
)
def test_param_groups_refuse(arguments, said):
    with pytest.raises(ValueError, match=said):
        param_groups(pretrained_net(), **arguments)
