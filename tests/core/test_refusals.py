"""What is refused, in which words, and that nothing has changed then."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.backends import dispatch
from resnet_reg_ext.backends.bucket import Bucket
from resnet_reg_ext.functional import prox_sgd_
from resnet_reg_ext.options import Options

pytestmark = pytest.mark.reads_tensors

BAD_OPTIONS = [
    ("lr", -0.1, "must be finite and not negative"),
    ("lr", math.nan, "must be finite and not negative"),
    ("lr", math.inf, "must be finite and not negative"),
    ("lr", "fast", "must be a number"),
    ("lr", "0.1", "must be a number"),
    ("lr", None, "must be a number"),
    ("lr", 10**400, "must be a number"),
    ("lr", torch.tensor([0.1, 0.2]), "must be a number"),
    ("lr", torch.tensor(-0.5), "must be finite and not negative"),
    ("l1", -1e-5, "must be finite and not negative"),
    ("l1", math.nan, "must be finite and not negative"),
    ("l1", math.inf, "must be finite and not negative"),
    ("weight_decay", -1e-4, "must be finite and not negative"),
    ("weight_decay", math.nan, "must be finite and not negative"),
    ("momentum", -0.1, "must be finite and not negative"),
    ("momentum", 1.0, "must be in [0, 1)"),
    ("momentum", 1.5, "must be in [0, 1)"),
    ("momentum", math.nan, "must be finite and not negative"),
    ("dampening", -0.1, "must be finite and not negative"),
    ("dampening", 1.1, "must be in [0, 1]"),
    ("dampening", math.nan, "must be finite and not negative"),
    ("l2_mode", "decoupled", "must be one of ('coupled', 'proximal')"),
    ("l2_mode", None, "must be one of ('coupled', 'proximal')"),
    ("fused", "yes", "must be None, True or False"),
    ("fused", 0, "must be None, True or False"),
    ("momentum_dtype", torch.float16, "must be None, torch.float32 or torch.bfloat16"),
    ("momentum_dtype", "bfloat16", "must be None, torch.float32 or torch.bfloat16"),
]
IDS = [
    f"{key} {'of two' if isinstance(value, torch.Tensor) and value.numel() > 1 else value}"
    for key, value, _ in BAD_OPTIONS
]


def shown(value):
    """The value as it stands in a message."""
    if isinstance(value, torch.Tensor):
        return str(value.item() if value.numel() == 1 else tuple(value.shape))
    return str(value)


def snapshot(optimizer):
    """Bytes of parameters, gradients and state, and the groups' options."""
    held = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for t in (p, p.grad, state.get("momentum_buffer"), state.get("master_weight")):
                strided = isinstance(t, torch.Tensor) and t.layout is torch.strided
                readable = strided and t.device.type == "cpu"
                held.append(
                    t.detach().clone().double().numpy().tobytes()
                    if readable and not t.is_complex()
                    else None
                )
            held.append(p in optimizer.state)
    options = [
        {k: repr(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    return held, options


def optimizer_of(*, fused=None, named=False, groups=2, stepped=True, **options):
    """Three parameters in each group, after one step."""
    torch.manual_seed(0)
    lists = []
    for g in range(groups):
        params = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
        for p in params:
            p.grad = torch.randn(5, 3)
        if named:
            params = [(f"layer{g}.weight{i}", p) for i, p in enumerate(params)]
        lists.append({"params": params})
    optimizer = ProxSGD(lists, lr=0.1, fused=fused, **options)
    if stepped:
        optimizer.step()
    return optimizer


def assert_refused(optimizer, error, *words):
    before = snapshot(optimizer)
    with pytest.raises(error) as caught:
        optimizer.step()
    for word in words:
        assert word in str(caught.value)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(("key", "value", "words"), BAD_OPTIONS, ids=IDS)
def test_options_at_construction(key, value, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ProxSGD([nn.Parameter(torch.ones(3))], **{key: value})
    assert key in str(caught.value)
    assert shown(value) in str(caught.value)


@pytest.mark.parametrize(("key", "value", "words"), BAD_OPTIONS, ids=IDS)
def test_options_of_a_group_at_construction(key, value, words):
    good, bad = ({"params": [nn.Parameter(torch.ones(3))]} for _ in range(2))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ProxSGD([good, {**bad, key: value}])
    assert f"param_groups[1]: {key}" in str(caught.value)
    assert shown(value) in str(caught.value)


@pytest.mark.parametrize(("key", "value", "words"), BAD_OPTIONS, ids=IDS)
def test_options_of_an_added_group(key, value, words):
    optimizer = optimizer_of()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], key: value})
    assert f"param_groups[2]: {key}" in str(caught.value)
    assert len(optimizer.param_groups) == 2
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("key", "value", "words"), BAD_OPTIONS, ids=IDS)
def test_options_at_a_step(key, value, words, fused):
    optimizer = optimizer_of(fused=fused)
    optimizer.param_groups[1][key] = value
    assert_refused(optimizer, ValueError, f"param_groups[1]: {key}", shown(value), words)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}],
    ids=["without momentum", "with dampening"],
)
def test_nesterov(options, fused):
    shown = f"momentum {options['momentum']}"
    with pytest.raises(ValueError, match="nesterov is True") as caught:
        ProxSGD([nn.Parameter(torch.ones(3))], nesterov=True, **options)
    assert shown in str(caught.value)
    optimizer = optimizer_of(fused=fused, nesterov=True)
    optimizer.param_groups[1].update(options)
    assert_refused(optimizer, ValueError, "param_groups[1]: nesterov is True", shown)
    for changed in options:  # as momentum's scheduler could
        assert optimizer.param_groups[1][changed] == options[changed]


NAMED = pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
FUSED = pytest.mark.parametrize("fused", [None, True, False])


def place(named, group=1, index=2):
    name = f" (layer{group}.weight{index})" if named else ""
    return f"param_groups[{group}]['params'][{index}]{name}: "


def last_parameter(optimizer):
    return optimizer.param_groups[-1]["params"][-1]


@FUSED
@NAMED
@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
def test_gradient_of_another_shape(fused, named, stepped):
    optimizer = optimizer_of(fused=fused, named=named, stepped=stepped)
    p = last_parameter(optimizer)
    p.data = torch.randn(4, 3)  # its gradient stays (5, 3)
    assert_refused(optimizer, ValueError, place(named), "gradient's shape is (5, 3)", "(4, 3)")


@FUSED
@NAMED
def test_gradient_of_as_many_elements_but_another_shape(fused, named):
    optimizer = optimizer_of(fused=fused, named=named)
    last_parameter(optimizer).data = torch.randn(3, 5)
    assert_refused(optimizer, ValueError, place(named), "gradient's shape is (5, 3)", "(3, 5)")


@FUSED
@NAMED
@pytest.mark.parametrize("shape", [(15,), (3, 5), (5, 3, 1), (), (5, 4)], ids=str)
def test_momentum_of_another_shape(fused, named, shape):
    optimizer = optimizer_of(fused=fused, named=named)
    optimizer.state[last_parameter(optimizer)]["momentum_buffer"] = torch.zeros(shape)
    words = f"momentum_buffer's shape is {shape}"
    assert_refused(optimizer, ValueError, place(named), words, "(5, 3)")


@FUSED
@NAMED
def test_momentum_on_another_device(fused, named):
    optimizer = optimizer_of(fused=fused, named=named)
    buffer = torch.zeros(5, 3, device="meta")
    optimizer.state[last_parameter(optimizer)]["momentum_buffer"] = buffer
    assert_refused(optimizer, ValueError, place(named), "momentum_buffer is on meta", "on cpu")


@FUSED
@NAMED
@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        ("none at all", "momentum_buffer is 'none at all': must be a tensor"),
        (torch.zeros(5, 3, dtype=torch.int64), "momentum_buffer's dtype is torch.int64"),
        (torch.zeros(5, 3, dtype=torch.complex64), "momentum_buffer's dtype is torch.complex64"),
        (torch.eye(5, 3).to_sparse(), "momentum_buffer's layout is torch.sparse_coo"),
        (torch.eye(5, 3).to_sparse_csr(), "momentum_buffer's layout is torch.sparse_csr"),
    ],
    ids=["text", "int64", "complex64", "sparse", "sparse rows"],
)
def test_momentum_that_is_no_real_tensor(fused, named, buffer, words):
    optimizer = optimizer_of(fused=fused, named=named)
    optimizer.state[last_parameter(optimizer)]["momentum_buffer"] = buffer
    assert_refused(optimizer, ValueError, place(named), words)


@FUSED
@NAMED
@pytest.mark.parametrize("loaded", [False, True], ids=["at the step", "when loading"])
def test_momentum_that_overlaps_itself(fused, named, loaded):
    """torch refuses to write to it, but only after the tensors before it would have moved."""
    optimizer = optimizer_of(fused=fused, named=named)
    words = (place(named), "momentum_buffer overlaps itself in memory", "strides (0, 0)")
    overlapping = torch.zeros(()).expand(5, 3)
    if loaded:
        saved = optimizer.state_dict()
        saved["state"][5] = {"momentum_buffer": overlapping}
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="overlaps") as caught:
            optimizer.load_state_dict(saved)
        assert all(word in str(caught.value) for word in words)
        assert snapshot(optimizer) == before
    else:
        optimizer.state[last_parameter(optimizer)]["momentum_buffer"] = overlapping
        assert_refused(optimizer, ValueError, *words)


@NAMED
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice(named):
    """It would have two updates at once, on one momentum buffer."""
    w, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    listed = [("w", w), ("b", b), ("again", w)] if named else [w, b, w]
    first, again = ("0] (w)", "2] (again)") if named else ("0]", "2]")
    with pytest.raises(ValueError, match="same parameter") as caught:
        ProxSGD(listed)
    assert f"param_groups[0]['params'][{again}" in str(caught.value)
    assert f"['params'][{first}" in str(caught.value)
    optimizer = optimizer_of()
    with pytest.raises(ValueError, match=re.escape("param_groups[2]['params'][1]")):
        optimizer.add_param_group({"params": [b, b]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("which", ["parameter", "momentum"])
def test_what_was_made_in_inference_mode(which):
    """Pure PyTorch can't write to it, and must find out before it has written to others."""
    optimizer = optimizer_of(fused=False)
    p = last_parameter(optimizer)
    with torch.inference_mode():
        made = torch.ones(5, 3)
    if which == "momentum":
        optimizer.state[p]["momentum_buffer"] = made
        words = (place(False), "momentum_buffer was made in inference mode")
    else:
        made.grad = torch.ones(5, 3)
        optimizer.param_groups[1]["params"][2] = made
        words = (place(False), "the parameter was made in inference mode")
    assert_refused(optimizer, ValueError, *words)


def test_a_group_that_is_no_dict():
    optimizer = optimizer_of()
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(nn.Parameter(torch.ones(3)))


@FUSED
@NAMED
def test_sparse_gradient(fused, named):
    optimizer = optimizer_of(fused=fused, named=named)
    p = last_parameter(optimizer)
    p.grad = torch.randn(5, 3).to_sparse()
    assert_refused(optimizer, ValueError, place(named), "sparse gradients are not supported")


@FUSED
def test_sparse_gradient_of_an_embedding(fused):
    embedding = nn.Embedding(6, 3, sparse=True)
    optimizer = ProxSGD(embedding.named_parameters(), fused=fused)
    embedding(torch.tensor([1, 2])).sum().backward()
    assert_refused(optimizer, ValueError, "param_groups[0]['params'][0] (weight)", "sparse")


@FUSED
@NAMED
def test_complex_parameter(fused, named):
    optimizer = optimizer_of(fused=fused, named=named)
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    optimizer.add_param_group({"params": [("z", p)] if named else [p]})
    name = " (z)" if named else ""
    assert_refused(optimizer, ValueError, f"param_groups[2]['params'][0]{name}: complex")


@FUSED
def test_complex_gradient_of_a_real_parameter(fused):
    p = torch.ones(3)
    with pytest.raises(ValueError, match=re.escape("params[0]: complex")):
        prox_sgd_([p], [torch.ones(3, dtype=torch.complex64)], lr=0.1, fused=fused)
    assert torch.equal(p, torch.ones(3))


@FUSED
def test_gradient_on_another_device(fused):
    params = [torch.ones(3), torch.ones(3)]
    grads = [torch.ones(3), torch.ones(3, device="meta")]
    with pytest.raises(ValueError, match=re.escape("params[1]: the gradient is on meta")):
        prox_sgd_(params, grads, lr=0.1, fused=fused)
    assert torch.equal(params[0], torch.ones(3))


@FUSED
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool], ids=str)
def test_parameter_that_is_no_float(fused, dtype):
    p = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(f"params[0]: its dtype is {dtype}")):
        prox_sgd_([p], [torch.ones(3)], lr=0.1, fused=fused)
    p = torch.ones(3)
    with pytest.raises(ValueError, match=re.escape("params[0]: the gradient's dtype is")):
        prox_sgd_([p], [torch.ones(3, dtype=dtype)], lr=0.1, fused=fused)
    assert torch.equal(p, torch.ones(3))


def test_fused_true_says_which_tensor_and_why():
    optimizer = optimizer_of(fused=True, named=True)
    gapped = nn.Parameter(torch.randn(5, 6)[:, ::2])
    gapped.grad = torch.randn(5, 3)
    optimizer.add_param_group({"params": [("gapped", gapped)]})
    assert_refused(
        optimizer,
        RuntimeError,
        "param_groups[2]['params'][0] (gapped): fused=True, but it is not dense",
        "fused=None",
    )


def test_first_groups_are_untouched_at_their_first_step_too():
    for fused in (None, True, False):
        optimizer = optimizer_of(fused=fused, stepped=False)
        last_parameter(optimizer).grad = torch.randn(5, 3).to_sparse()
        assert_refused(optimizer, ValueError, place(False))
        assert not optimizer.state


def test_parameter_that_overlaps_itself():
    """torch can't write to it either; the tensors before it must not have moved."""
    for fused in (None, True, False):
        params = [torch.ones(3), torch.ones(1).expand(3)]
        with pytest.raises((RuntimeError, ValueError)):
            prox_sgd_(params, [torch.ones(3), torch.ones(3)], lr=0.1, fused=fused)
        assert torch.equal(params[0], torch.ones(3))
        assert torch.equal(params[1], torch.ones(3))


def checkpoint_of(shapes, momentum=0.9):
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = ProxSGD(params, momentum=momentum)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(5, 3), (5, 3), (5, 4)], "momentum_buffer's shape is (5, 4)"),
        ([(5, 3), (5, 3)], "the checkpoint has 1 param_groups of 2 parameters, the optimizer 1"),
        ([(5, 3), (5, 3), (15,)], "momentum_buffer's shape is (15,)"),
    ],
    ids=["another shape", "fewer parameters", "as many elements"],
)
def test_checkpoint_of_another_model(shapes, words):
    optimizer = optimizer_of(groups=1, named=True)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        optimizer.load_state_dict(checkpoint_of(shapes))
    if "momentum_buffer" in words:
        assert place(True, group=0) in str(caught.value)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Adagrad])
def test_checkpoint_of_another_kind_of_optimizer(other):
    optimizer = optimizer_of(groups=1)
    params = [nn.Parameter(torch.ones(5, 3)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(5, 3)
    another = other(params)
    another.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: the checkpoint has no momentum"):
        optimizer.load_state_dict(another.state_dict())
    assert snapshot(optimizer) == before


def test_checkpoint_with_another_number_of_groups():
    optimizer = optimizer_of(groups=2)
    before = snapshot(optimizer)
    words = "the checkpoint has 1 param_groups of 3 parameters, the optimizer 2 param_groups of 6"
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(checkpoint_of([(5, 3)] * 3))
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(("key", "value"), [("lr", -1.0), ("momentum", 1.0), ("l1", math.nan)])
def test_checkpoint_with_options_out_of_range(key, value):
    optimizer = optimizer_of()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1][key] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape(f"param_groups[1]: {key} is {value}")):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_lists_of_different_lengths():
    p, g = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="2 params, but 1 grads"):
        prox_sgd_([p, p.clone()], [g], lr=0.1)
    with pytest.raises(ValueError, match="1 params, but 0 momentum_buffers"):
        prox_sgd_([p], [g], [], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="momentum_buffers must be given"):
        prox_sgd_([p], [g], lr=0.1, momentum=0.9)
    assert torch.equal(p, torch.ones(3))


def test_what_is_no_tensor_in_a_list():
    p = torch.ones(3)
    with pytest.raises(TypeError, match=r"grads\[1\] is a NoneType: must be a tensor"):
        prox_sgd_([p, p.clone()], [torch.ones(3), None], lr=0.1)
    prox_sgd_([p], iter([torch.ones(3)]), lr=0.5)
    assert p.tolist() == [0.5] * 3


@pytest.mark.parametrize("value", [torch.tensor(0.1j), torch.tensor(0.1, device="meta")], ids=str)
def test_an_lr_that_is_no_real_number(value):
    with pytest.raises(ValueError, match=r"lr is tensor\(.*\): must be a number"):
        ProxSGD([nn.Parameter(torch.ones(3))], lr=value)


def test_a_state_that_was_replaced_by_a_plain_dict():
    """torch's SGD refuses it before it steps; here it is a state like any other."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer, other = ProxSGD([params[0]], 0.1, l1=0.0), torch.optim.SGD([params[1]], 0.1, 0.9)
    other.param_groups[0]["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
    optimizer.state = {}
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(3)
        optimizer.step()
        other.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("key", ["lr", "l1", "weight_decay"])
def test_a_number_too_large_for_the_compute_type(key):
    """It is finite but an infinity in float32: refused or not, but alike, and nothing half done."""
    outcomes = []
    for fused in (True, False, None):
        options = {"lr": 0.1, "weight_decay": 0.1, key: 1e39}
        p, m = torch.ones(3), torch.ones(3)
        try:
            prox_sgd_([p], [torch.ones(3)], [m], momentum=0.5, fused=fused, **options)
        except (ValueError, RuntimeError):
            assert torch.equal(p, torch.ones(3))
            assert torch.equal(m, torch.ones(3))
            outcomes.append("refused")
        else:
            outcomes.append(str((p, m)))
    assert outcomes == outcomes[:1] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fitting", "misfits"])
@pytest.mark.parametrize("fused", [None, False])
def test_parameters_are_named_for_errors_only(fused, dtype):
    """Looking one up takes time that grows with the group: for each, the square of that."""
    params = [torch.ones(3), torch.ones(3)]
    grads = [torch.ones(3, dtype=dtype) for _ in params]

    def name(index):
        raise AssertionError("no error to name a parameter in")

    options = Options.from_group(ProxSGD([torch.ones(1)]).param_groups[0])
    bucket = Bucket(params, grads, [torch.ones(3) for _ in params], None, False, name)
    dispatch.prepare(bucket, options, fused=fused)()
    assert all((p != 1).all() for p in params)
