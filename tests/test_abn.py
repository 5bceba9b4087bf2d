"""Activated batch norm against its formula, what in-place computation refuses, and synchronised real processes."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
from gradients import assert_same_gradients
from programs import forked_processes
from torch import nn
from torch.nn import functional as F

from benchmarks import inplace_abn
from libs import ABN, ABNSync, InPlaceABN, InPlaceABNSync, native
from networks import build_model

ACTIVATIONS = {
    "leaky_relu": lambda y: torch.where(y >= 0, y, 0.01 * y),
    "elu": lambda y: torch.where(y >= 0, y, y.exp() - 1),
    "identity": lambda y: y,
    "none": lambda y: y,
    "relu": lambda y: torch.where(y > 0, y, 0.0),
}
KINDS = [ABN, ABNSync, InPlaceABN, InPlaceABNSync]
KINDS_AND_ACTIVATIONS = [
    (kind, activation) for kind in KINDS for activation in ACTIVATIONS if activation != "relu" or not kind._in_place
]


def by_formula(x, weight, bias, eps, activation, mean=None, var=None):
    dims = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    if mean is None:
        mean, var = x.mean(dims), x.var(dims, correction=0)
    xhat = (x - mean.view(shape)) / (var + eps).sqrt().view(shape)
    return ACTIVATIONS[activation](xhat * (weight.abs() + eps).view(shape) + bias.view(shape))


def module_with_values(kind, channels, **arguments):
    module = kind(channels, **arguments).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()  # negative weights too: |weight| is used
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return module


# ---- numbers ----


@pytest.mark.parametrize(("kind", "activation"), KINDS_AND_ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (6, 3), (2, 3, 7), (1, 3, 2, 3, 4)], ids=str)
def test_training_matches_the_formula(kind, activation, shape):
    module = module_with_values(kind, 3, activation=activation)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result, expected = module(x.clone()), by_formula(x, module.weight, module.bias, 1e-5, activation)
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, {"x": x, "weight": module.weight, "bias": module.bias})


@pytest.mark.parametrize(("kind", "activation"), KINDS_AND_ACTIVATIONS)
def test_frozen_statistics_are_constants(kind, activation):
    """As in fine-tuning: weight, bias and input have gradients, and the statistics stay."""
    module = module_with_values(kind, 3, activation=activation).eval()
    mean, var = module.running_mean.clone(), module.running_var.clone()
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    expected = by_formula(x, module.weight, module.bias, 1e-5, activation, mean, var)
    result = module(x.clone())
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, {"x": x, "weight": module.weight, "bias": module.bias})
    assert torch.equal(module.running_mean, mean)
    assert torch.equal(module.running_var, var)


@pytest.mark.parametrize("training", [True, False])
def test_without_weight_and_bias(training):
    module = module_with_values(InPlaceABN, 3, affine=False).train(training)
    mean, var = (None, None) if training else (module.running_mean.clone(), module.running_var.clone())
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    expected = by_formula(x, one - 1e-5, zero, 1e-5, "leaky_relu", mean, var)
    result = module(x.clone())
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, {"x": x})


@pytest.mark.parametrize("training", [True, False])
def test_chain_of_convolutions(training):
    """convolution, in-place batch norm, convolution: every gradient is that of the formula."""
    first, second = nn.Conv2d(2, 5, 3).double(), nn.Conv2d(5, 3, 3).double()
    norm = module_with_values(InPlaceABN, 5).train(training)
    mean, var = (None, None) if training else (norm.running_mean.clone(), norm.running_var.clone())
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    expected = second(by_formula(first(x), norm.weight, norm.bias, 1e-5, "leaky_relu", mean, var))
    inputs = {"x": x, **{f"{i}.{n}": p for i, m in enumerate((first, norm, second)) for n, p in m.named_parameters()}}
    assert_same_gradients(second(norm(first(x))), expected, inputs)


def test_running_statistics_are_unbiased_and_used_in_evaluation():
    module = ABN(2, momentum=0.25, activation="identity").double()
    x = 3 + 2 * torch.randn(4, 2, 3, 3, dtype=torch.float64)
    module(x)
    torch.testing.assert_close(module.running_mean, 0.25 * x.mean((0, 2, 3)))
    torch.testing.assert_close(module.running_var, 0.75 + 0.25 * x.var((0, 2, 3), correction=1))
    before = module.running_mean.clone()
    y = module.eval()(x)
    assert torch.equal(module.running_mean, before)
    centred = x - module.running_mean.view(1, 2, 1, 1)
    expected = centred / (module.running_var + 1e-5).sqrt().view(1, 2, 1, 1) * (1 + 1e-5)
    torch.testing.assert_close(y, expected)


def test_without_momentum_the_running_statistics_are_means_over_all_batches():
    module, plain = ABN(2, momentum=None), nn.BatchNorm2d(2, momentum=None)
    for _ in range(3):
        x = torch.randn(4, 2, 3, 3)
        module(x), plain(x)
    torch.testing.assert_close(module.running_mean, plain.running_mean)
    torch.testing.assert_close(module.running_var, plain.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_modules_of_16_bits(dtype):
    module = InPlaceABN(3).to(dtype)
    x = torch.randn(4, 3, 8, 8)
    y = module(x.to(dtype))
    assert y.dtype == module.running_mean.dtype == dtype
    torch.testing.assert_close(y.float(), F.leaky_relu(F.batch_norm(x, None, None, training=True)), atol=3e-2, rtol=0)
    torch.testing.assert_close(module.running_mean.float(), 0.1 * x.mean((0, 2, 3)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", [ABN, InPlaceABN])
def test_an_empty_batch_leaves_the_running_statistics(kind):
    module = module_with_values(kind, 3)
    before = copy.deepcopy(module.state_dict())
    x = torch.zeros(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = module(x.clone())
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert module.weight.grad.eq(0).all()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_state_dict_names():
    assert list(InPlaceABNSync(4).state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert list(InPlaceABN(4, affine=False).state_dict()) == ["running_mean", "running_var"]


def test_made_elsewhere_and_loaded_or_reset():
    """On the meta device, then assigned to, or made empty and reset; no buffer is left out by either."""
    module = module_with_values(ABN, 3)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.device("meta"):
        assigned = ABN(3)
    assigned.load_state_dict(module.state_dict(), assign=True)
    torch.testing.assert_close(assigned(x), module(x))
    empty = ABN(3, momentum=None, device="meta", dtype=torch.float64).to_empty(device="cpu")
    empty.reset_parameters()
    torch.testing.assert_close(empty(x), ABN(3).double()(x))
    torch.testing.assert_close(empty.running_mean, x.mean((0, 2)))
    empty.reset_running_stats()
    assert torch.equal(empty.running_mean, torch.zeros(3))
    assert torch.equal(empty.running_var, torch.ones(3))


def test_names_that_inplace_abn_has():
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(ABN(3, activation_param=0.2)(x), ABN(3, slope=0.2)(x))
    torch.testing.assert_close(ABN(3, activation="elu", activation_param=1.0)(x), ABN(3, activation="elu")(x))
    torch.testing.assert_close(ABN(3, activation="relu")(x), ABN(3, activation="identity")(x).relu())
    with pytest.raises(ValueError, match=r"activation_param: expected 1, the alpha of elu, got 0\.5"):
        ABN(3, activation="elu", activation_param=0.5)


# ---- errors ----


def test_errors_name_the_argument():
    with pytest.raises(
        ValueError, match="activation: expected one of leaky_relu, relu, elu, identity, none, got 'gelu'"
    ):
        ABN(3, activation="gelu")
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 3, ...\], got \[2, 4, 1, 1\]"):
        ABN(3)(torch.zeros(2, 4, 1, 1))
    for x, message in [
        (torch.zeros(1, 3, 1, 1), r"x: expected more than one element a channel in training, got \[1, 3, 1, 1\]"),
        (
            torch.zeros(2, 3, 1, 1, dtype=torch.int),
            "x: expected float32, float64, bfloat16 or float16, got",
        ),
        (torch.zeros(2, 3, 1, 1).double(), "weight: expected torch.float64 for x of torch.float64, got torch.float32"),
        (torch.zeros(2, 3, 1, 1, device="meta"), "weight: expected on meta as x is, got cpu"),
    ]:
        for kind in KINDS:
            with pytest.raises(ValueError, match=message):
                kind(3)(x)
    with pytest.raises(
        ValueError, match=r"weight: expected torch\.float16 or torch\.float32 for x of torch.float16, got"
    ):
        ABN(3).bfloat16()(torch.zeros(2, 3, 1, 1).half())


@pytest.mark.parametrize("kind", [InPlaceABN, InPlaceABNSync])
def test_what_cannot_be_computed_in_place_is_an_error(kind):
    with pytest.raises(ValueError, match="slope: expected more than 0"):
        kind(3, slope=0)
    with pytest.raises(ValueError, match="activation: relu cannot be inverted, so its input is kept; use leaky_relu"):
        kind(3, activation="relu")
    module = kind(3)
    with pytest.raises(ValueError, match="x: a leaf that requires a gradient cannot be overwritten; use ABN"):
        module(torch.randn(2, 3, 4, 4, requires_grad=True))
    for x in (torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4), torch.randn(2, 3, 12).unfold(2, 4, 3)):
        with pytest.raises(ValueError, match=r"x: expected elements that do not share memory, got shape.*strides"):
            module(x)
    with pytest.raises(ValueError, match="eps: expected more than 0, since a weight of 0 could not be inverted"):
        kind(3, eps=0)(torch.randn(2, 3, 4, 4))


def test_a_weight_of_zero():
    """|weight| + eps is inverted."""
    module = module_with_values(InPlaceABN, 3)
    with torch.no_grad():
        module.weight[1] = 0
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = by_formula(x, module.weight, module.bias, 1e-5, "leaky_relu")
    assert_same_gradients(module(x.clone()), expected, {"x": x, "weight": module.weight, "bias": module.bias})


def test_abn_that_is_not_in_place_takes_what_cannot_be_inverted():
    module = module_with_values(ABN, 3, slope=0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = by_formula(x, module.weight, module.bias, 1e-5, "identity").relu()
    assert_same_gradients(module(x), expected, {"x": x, "weight": module.weight, "bias": module.bias})


@pytest.mark.skipif(not native.LOADED, reason="the reference does not overwrite")
@pytest.mark.parametrize("before", [torch.sigmoid, torch.relu, torch.exp, torch.tanh])
@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_autograd_still_needs_is_an_error(before, training):
    """And not a wrong gradient: PyTorch counts how often a tensor was written to."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = InPlaceABN(3).train(training)(before(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    saved = before(x)
    with torch.no_grad():  # no gradient of the norm itself
        InPlaceABN(3).train(training)(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.skipif(not native.LOADED, reason="the reference does not overwrite")
def test_an_output_that_is_written_to_is_an_error():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = F.relu_(InPlaceABN(3, activation="identity")(x.clone()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- memory ----


@pytest.mark.skipif(not native.LOADED, reason="the reference does not overwrite")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_in_the_inputs_memory(kind, training):
    x = torch.randn(2, 3, 4, 4)
    y = kind(3).train(training)(x)
    assert (y.data_ptr() == x.data_ptr()) == kind._in_place
    assert torch.equal(x, y) == kind._in_place


@pytest.mark.skipif(not native.LOADED, reason="the reference saves as plain PyTorch does")
def test_memory_of_a_block_of_two_convolutions():
    """One tensor is kept between the convolutions, with relu two; plain PyTorch keeps two with the activation in place,
    or three."""
    x = torch.randn(2, 64, 33, 33)
    one = 2 * 256 * 33 * 33 * 4
    with_relu = inplace_abn.saved_bytes(inplace_abn.block(ABN(256, activation="relu")), x)
    assert 2 * one < with_relu <= inplace_abn.saved_bytes(inplace_abn.block(nn.BatchNorm2d(256), nn.ReLU(True)), x)
    for norm in (ABN(256), InPlaceABN(256)):
        assert one <= inplace_abn.saved_bytes(inplace_abn.block(norm), x) < 1.01 * one
    for in_place, tensors in ((True, 2), (False, 3)):
        plain = inplace_abn.block(nn.BatchNorm2d(256), nn.LeakyReLU(0.01, in_place))
        assert tensors * one <= inplace_abn.saved_bytes(plain, x) < 1.01 * tensors * one


@pytest.mark.skipif(not native.LOADED, reason="the reference saves as plain PyTorch does")
def test_memory_of_the_network():
    """In the backbone leaky_relu keeps at most 0.65 of what BatchNorm2d and ReLU in place keep; identity no more."""
    images = torch.randn(2, 3, 65, 65).contiguous(memory_format=torch.channels_last)
    faithful, fused = (build_model("resnet50", backbone_activation=name) for name in ("identity", "leaky_relu"))
    plain = inplace_abn.saved_bytes(inplace_abn.with_plain_norms(faithful), images)
    assert inplace_abn.saved_bytes(fused, images) < 0.65 * plain
    assert inplace_abn.saved_bytes(faithful, images) <= plain


# ---- several processes ----


def start(rank, size, folder):
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)


def sync_case(batch, kind, activation):
    torch.manual_seed(3)
    module = kind(3, activation=activation).double()
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    x = 5 + torch.randn(batch, 3, 2, 4, dtype=torch.float64)
    x += 100 * torch.arange(batch).view(-1, 1, 1, 1)  # the parts' means differ much
    return module, x, torch.randn(batch, 3, 2, 4, dtype=torch.float64)


class CountsCollectives:
    """How many collectives a process starts; not when compiling, which cannot follow the count."""

    def __init__(self, compiled):
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.names = () if compiled else (gather, "all_reduce")

    def __enter__(self):
        self.count = 0
        self.originals = {name: getattr(dist, name) for name in self.names}
        for name, function in self.originals.items():
            setattr(dist, name, self.counting(function))
        return self

    def counting(self, function):
        def call(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, function in self.originals.items():
            setattr(dist, name, function)


def sync_worker(rank, sizes, compiled, case, folder):
    start(rank, len(sizes), folder)
    module, whole, upstream = sync_case(sum(sizes), *case)
    begin = sum(sizes[:rank])
    x = whole[begin : begin + sizes[rank]].clone().requires_grad_()
    forward_pass = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    with CountsCollectives(compiled) as forward:
        y = forward_pass(x.clone())
    with CountsCollectives(compiled) as backward:
        y.backward(upstream[begin : begin + sizes[rank]])
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    torch.save(
        {"y": y.detach(), "x": x.grad, "weight": module.weight.grad, "bias": module.bias.grad,
         "mean": module.running_mean, "var": module.running_var,
         "collectives": torch.tensor([forward.count, backward.count])},
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    dist.barrier()  # a process that leaves closes connections that another may still use
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "compiled", "case"),
    [
        ((2, 0, 1), False, (InPlaceABNSync, "leaky_relu")),
        ((1, 3), True, (InPlaceABNSync, "leaky_relu")),
        ((3, 1), False, (ABNSync, "relu")),
    ],
)
def test_synchronised_equals_one_process_with_the_whole_batch(sizes, compiled, case, tmp_path):
    if compiled and not native.LOADED:
        pytest.skip("the reference reads sizes from the group, which is not compiled as one graph")
    forked_processes(sync_worker, (sizes, compiled, case, str(tmp_path)), len(sizes))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(sizes))]
    module, x, upstream = sync_case(sum(sizes), *case)
    x.requires_grad_()
    y = module(x.clone())
    y.backward(upstream)
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach())
    torch.testing.assert_close(torch.cat([part["x"] for part in parts]), x.grad)
    for part in parts:
        for name, expected in (
            ("weight", module.weight.grad),
            ("bias", module.bias.grad),
            ("mean", module.running_mean),
            ("var", module.running_var),
        ):
            torch.testing.assert_close(part[name], expected, msg=lambda text, name=name: f"{name}: {text}")
        if native.LOADED and not compiled:
            assert part["collectives"].tolist() == [1, 1]


def dying_worker(rank, dies_before, folder):
    start(rank, 2, folder)
    module, x, upstream = sync_case(2, InPlaceABNSync, "leaky_relu")
    x = x[rank : rank + 1].requires_grad_()
    module(x.clone()).backward(upstream[:1])
    try:
        if rank == 1 and dies_before == "forward":
            os._exit(0)
        y = module(x.clone())
        if rank == 1:
            os._exit(0)
        y.backward(upstream[:1])
    except RuntimeError as error:
        with open(f"{folder}/error", "w") as file:
            file.write(str(error))
    os._exit(0)  # without the group's own farewell, for which the other is missing


@pytest.mark.slow
@pytest.mark.parametrize("dies_before", ["forward", "backward"])
def test_a_process_that_dies_is_an_error_in_the_others(dies_before, tmp_path):
    forked_processes(dying_worker, (dies_before, str(tmp_path)), 2)
    assert (tmp_path / "error").read_text()
