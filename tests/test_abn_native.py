"""The native activated batch norm: every instruction set, dtype, layout and activation against the reference in
float64, and what PyTorch does with operators: compiling, autocast, checks of its own."""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out
from targets import ALL_CAPABILITIES, EMULATED, TARGETS, best_capability, running_on
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from libs import ABN, InPlaceABN, native, reference
from libs.functional import activated_batch_norm
from networks import build_model

pytestmark = pytest.mark.skipif(not native.LOADED, reason="needs the native operators: pip install -e .")

# Largest error over the largest number, of results, gradients and running statistics
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)
INVERTIBLE = ["leaky_relu", "elu", "identity"]
ACTIVATIONS = [*INVERTIBLE, "relu"]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]


def case(shape, dtype, training=True, residual=False):
    """Arguments of batch norm by name, upstream gradient included, whose numbers dtype can hold."""
    channels = shape[1]
    weight = torch.randn(channels, dtype=torch.float64)
    tensors = {
        "x": torch.randn(shape, dtype=torch.float64) * 2 + torch.randn(channels).view(1, -1, *[1] * (len(shape) - 2)),
        "weight": weight.sign() * (weight.abs() + 0.3),
        "bias": torch.randn(channels, dtype=torch.float64),
        "running_mean": torch.randn(channels, dtype=torch.float64),
        "running_var": torch.rand(channels, dtype=torch.float64) + 0.5,
        "upstream": torch.randn(shape, dtype=torch.float64),
    }
    if residual:
        tensors["residual"] = torch.randn(shape, dtype=torch.float64)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    per_pixel = ("x", "upstream", "residual")
    return {name: x.to(dtype if name in per_pixel else parameters) for name, x in tensors.items()} | {
        "training": training
    }


def run(function, arguments, activation="leaky_relu", **more):
    """z, the gradients and the running statistics by name."""
    arguments = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    upstream = arguments.pop("upstream")
    inputs = {
        name: arguments[name].requires_grad_() for name in ("x", "weight", "bias", "residual") if name in arguments
    }
    if more.get("in_place"):  # not a leaf, and with the strides of one
        arguments["x"] = inputs["x"].as_strided(inputs["x"].shape, inputs["x"].stride()).clone()
    z = function(**arguments, momentum=0.3, eps=1e-5, activation=activation, slope=0.01, **more)
    gradients = torch.autograd.grad(z, list(inputs.values()), upstream)
    return {
        "z": z.detach(),
        **{f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)},
        **{name: arguments[name] for name in ("running_mean", "running_var")},
    }


def normaliser_of(x, count=0):
    """Of channels of mean 0 and deviation 1; see csrc/abn.cpp."""
    normaliser = torch.zeros(4, x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    normaliser[2] = 1
    normaliser[3] = 1 / count if count else 0
    return normaliser


def exactly(arguments):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def assert_close(actual, expected, tolerance, context=""):
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        if wanted.numel():
            error = (actual[name].double() - wanted).abs().max() / max(wanted.abs().max(), 1)
            message = f"{name}: error {error:.1e} of the largest number, expected {tolerance:.0e}; {context}"
            assert error <= tolerance, message


def assert_as_reference(shape, dtype, activation, layout="contiguous", training=True, in_place=False, residual=False):
    arguments = case(shape, dtype, training, residual)
    if activation == "elu":  # z near -1 tells y badly (test_what_is_recovered_from_the_result): not here
        arguments["weight"], arguments["bias"] = arguments["weight"] / 4, arguments["bias"] / 4
    expected = run(reference.activated_batch_norm, exactly(arguments), activation)
    arguments["x"], arguments["upstream"] = (laid_out(arguments[name], layout) for name in ("x", "upstream"))
    actual = run(activated_batch_norm, arguments, activation, in_place=in_place and activation in INVERTIBLE)
    context = f"{list(shape)} {dtype} {activation} {layout}, training {training}, residual {residual}"
    assert_close(actual, expected, TOLERANCE[dtype], context)


# Every path with every activation: whole packs of 16 bytes in planes and in rows, and neither
SMALL_SHAPES = [(2, 16, 2, 8), (2, 3, 5, 7)]
# Channels on, below and above the vectors' lanes (4, 8, 16) and the strips of 512; planes of less and more than a part
SHAPES = [(1, 64, 33, 5), (3, 19, 1, 1), (2, 530, 3, 3), (1, 2, 97, 131), (5, 33), (2, 17, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_every_activation_with_and_without_residual(each_target, dtype, shape):
    for activation, layout, residual in product(ACTIVATIONS, ("contiguous", "channels_last"), (False, True)):
        assert_as_reference(shape, dtype, activation, layout, in_place=residual, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(each_target, dtype, shape):
    for number, layout in enumerate(("contiguous", "channels_last"), start=DTYPES.index(dtype)):
        activation = ACTIVATIONS[number % len(ACTIVATIONS)]
        assert_as_reference(shape, dtype, activation, layout, in_place=True, residual=number % 2 == 1)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 4),
    c=st.integers(1, 70) | st.sampled_from([128, 511, 512, 513, 1025]),
    pixels=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    training=st.booleans(),
    in_place=st.booleans(),
    residual=st.booleans(),
)
def test_any_shape_layout_and_dtype(target, n, c, pixels, layout, dtype, activation, training, in_place, residual):
    torch.manual_seed(0)
    shape = [n, c, *pixels]
    if training and n * torch.Size(pixels).numel() < 3:
        training = False  # with two elements a channel, xhat is 1 and -1 whatever x is: gradients are rounding only
    if layout == "transposed" and len(shape) < 4:
        layout = "sliced"
    with running_on(target):
        assert_as_reference(shape, dtype, activation, layout, training, in_place, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["leaky_relu", "identity", "relu"])
def test_errors_are_at_most_twice_those_of_pytorch(each_target, dtype, layout, activation):
    """Of the reference in the same dtype, both against float64: norms over all elements.

    Gradients in 16 bits are a matter of their own: PyTorch has x, in-place batch norm has z, each rounded. Beside an
    activation that has shrunk it, z of a negative number is as exact as x; where |bias| is larger than |weight|, less.
    """
    arguments = case((2, 48, 31, 29), dtype)
    exact = run(reference.activated_batch_norm, exactly(arguments), activation)
    plain = run(reference.activated_batch_norm, arguments, activation)
    arguments["x"], arguments["upstream"] = (laid_out(arguments[name], layout) for name in ("x", "upstream"))
    ours = run(activated_batch_norm, arguments, activation)
    for name, wanted in exact.items():
        error, plain_error = ((x[name].double() - wanted).norm() for x in (ours, plain))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * wanted.norm(), f"{name}: {error} and {plain_error}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 16, 64, 64), (4, 5, 33, 31), (1, 600, 20, 20)], ids=str)
def test_small_deviations_beside_a_large_mean(each_target, shape, layout):
    """Mean 1e4 and deviation 1e-2 in float32: as exact as the numbers that x can hold."""
    arguments = case(shape, torch.float32)
    x = 1e4 + 1e-2 * torch.randn(shape, dtype=torch.float64)
    x[0, 0, 0, 0] = 0  # the first element, from which deviations are taken, may be far off
    arguments["x"] = x.float()
    expected = run(reference.activated_batch_norm, exactly(arguments))
    arguments["x"] = laid_out(arguments["x"], layout)
    # The gradient of x is larger by 1 / deviation than that of a usual input: it is compared with its largest number.
    assert_close(run(activated_batch_norm, arguments), expected, 2e-5)


@pytest.mark.parametrize("target", ["cpu", EMULATED, "cuda"])
def test_merging_statistics_of_parts_far_apart(target):
    parts = [1e4 + torch.randn(3, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64), torch.zeros(0, 5)]
    whole = torch.cat([part.double() for part in parts])
    with running_on(best_capability() if target == "cpu" else target):
        statistics = torch.stack([torch.ops.ccnet.abn_statistics(part.double()) for part in parts])
        running = torch.zeros(2, 5, dtype=torch.float64).unbind()
        normaliser = torch.ops.ccnet.abn_normaliser_of_parts_(statistics, *running, 1.0, 1e-5)
    torch.testing.assert_close(running[0], whole.mean(0))
    torch.testing.assert_close(running[1], whole.var(0))
    deviation = (whole.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(
        normaliser,
        torch.stack([whole.mean(0), torch.zeros(5), 1 / deviation, torch.full([5], 1 / 43)]),
        check_dtype=False,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", [*ALL_CAPABILITIES, "cuda"])  # the emulator's order: tests/test_cuda_kernels.py
def test_same_bits_for_any_number_of_threads_and_in_every_run(target, dtype, layout):
    with running_on(target):
        assert_same_bits_for_any_number_of_threads(dtype, layout)


def assert_same_bits_for_any_number_of_threads(dtype, layout):
    arguments = case((3, 37, 70, 81), dtype)
    arguments["x"], arguments["upstream"] = (laid_out(arguments[name], layout) for name in ("x", "upstream"))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 2):
            torch.set_num_threads(threads)
            results.append(run(activated_batch_norm, arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize(
    ("activation", "layout", "in_place"),
    [
        ("leaky_relu", "contiguous", True),
        ("elu", "channels_last", False),
        ("identity", "sliced", True),
        ("relu", "channels_last", False),
        ("relu", "sliced", False),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(activation, layout, training, in_place):
    arguments = case((2, 2, 3, 2), torch.float64, training, residual=True)
    del arguments["upstream"]
    names = ("x", "weight", "bias", "residual")
    inputs = [laid_out(arguments[name], layout if name == "x" else "contiguous").requires_grad_() for name in names]
    arguments |= {"momentum": 0, "eps": 1e-5, "activation": activation, "slope": 0.1, "in_place": in_place}

    def function(x, *others):
        given = dict(zip(names, (laid_out(x * 1, layout), *others), strict=False))
        return activated_batch_norm(**{**arguments, "residual": None, **given})

    assert torch.autograd.gradcheck(function, inputs[:3])
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_one_input_only(wanted, activation, training):
    arguments = case((2, 3, 3, 4), torch.float64, training, residual=True)
    upstream = arguments.pop("upstream")
    arguments[wanted].requires_grad_()
    options = {"momentum": 0, "eps": 1e-5, "activation": activation, "slope": 0.01}
    gradients = [
        torch.autograd.grad(function(**arguments, **options), arguments[wanted], upstream)[0]
        for function in (activated_batch_norm, reference.activated_batch_norm)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", INVERTIBLE)
def test_what_is_recovered_from_the_result(each_target, dtype, activation):
    """y - bias, from sums of one element each: the error is that of rounding z."""
    channels = 501
    y = torch.linspace(-5, 5, channels, dtype=torch.float64)
    z = reference.activate(y, activation, 0.01).to(dtype).view(1, channels)
    gain, bias = 1.5 + torch.rand(2, channels, dtype=torch.float64)
    parameters = [x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in (gain - 1e-5, bias)]
    sums, grad_weight, _ = torch.ops.ccnet.abn_backward_sums(
        None, z, torch.ones_like(z), normaliser_of(z), *parameters, None, 1e-5, activation, 0.01
    )
    torch.testing.assert_close(grad_weight.double(), sums[1].double() / gain, rtol=1e-6, atol=0)
    sums = sums.double()
    slope = torch.where(z[0] > 0, 1, {"leaky_relu": 0.01, "elu": z[0].double() + 1, "identity": 1}[activation])
    torch.testing.assert_close(sums[0], slope, rtol=1e-6, atol=0, check_dtype=False)
    # Half a step of z, over the slope there
    half_step = torch.finfo(dtype).eps * z[0].double().abs().clamp(min=torch.finfo(dtype).smallest_normal) / 2
    expected = y - bias
    allowed = half_step / slope * 1.01 + 4 * torch.finfo(parameters[0].dtype).eps * (1 + expected.abs() + bias)
    assert ((sums[1] / sums[0] - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elu_of_very_negative_numbers(each_target, dtype):
    """Where z is -1, y cannot be recovered; it is taken to be as far as z could still tell, and nothing is infinite."""
    z = torch.tensor([[-1.0, -1.0], [-0.5, 3.0]], dtype=dtype)
    kept = (None, z, torch.ones_like(z), normaliser_of(z, count=5))
    sums, *_ = torch.ops.ccnet.abn_backward_sums(*kept, None, None, None, 1e-5, "elu", 0.01)
    assert sums.isfinite().all()
    torch.testing.assert_close(sums[0].double(), torch.tensor([0.5, 1.0], dtype=torch.float64))
    grad_x, _ = torch.ops.ccnet.abn_backward(*kept, sums, None, None, None, 1e-5, "elu", 0.01)
    assert grad_x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_elu_and_its_inverse_near_zero_and_far_away(each_target, dtype):
    """Relative errors, also where e^y - 1 would lose all digits."""
    y = -torch.logspace(-30, 1, 500, dtype=torch.float64).view(1, -1)
    y = y.to(dtype)
    normaliser = normaliser_of(y)
    z = torch.ops.ccnet.abn_forward(y, normaliser, None, None, None, 1e-30, "elu", 0.01)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(z.double(), torch.expm1(y.double()), rtol=4 * eps, atol=0)
    near = y > -2
    sums, *_ = torch.ops.ccnet.abn_backward_sums(
        None, z, torch.ones_like(z), normaliser, None, None, None, 1e-30, "elu", 0.01
    )
    recovered = (sums[1].double() / sums[0].double())[near[0]]
    torch.testing.assert_close(recovered, torch.log1p(z.double())[near], rtol=8 * eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [True, False])
def test_relu_has_a_gradient_where_its_result_is_not_0(each_target, dtype, layout, residual):
    """As PyTorch's: at 0 and where z is rounded to 0 there is none, whatever that of z; NaN has one."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, tiny, -tiny, 1e-4, -1e-4] * 5, dtype=dtype)
    x = laid_out(torch.stack([numbers, numbers * 0.5]).view(2, 2, 4, 5), layout)
    rest = torch.zeros_like(x) if residual else None
    weight = torch.full([2], 0.4, dtype=normaliser_of(x).dtype)
    options = (weight, torch.zeros_like(weight), rest, 1e-5, "relu", 0.01)
    z = torch.ops.ccnet.abn_forward(x, normaliser_of(x), *options)
    expected = torch.where(z > 0, 0.40001, 0).to(dtype)
    grad_z = torch.where(z > 0, 1, torch.inf).to(dtype)
    options = (None, *options[:2], None, *options[3:])
    kept = (x, z if residual else None, grad_z, normaliser_of(x))
    grad_x, grad_residual = torch.ops.ccnet.abn_backward(*kept, *options)
    torch.testing.assert_close(grad_x, expected)
    if residual:
        assert torch.equal(grad_residual, (z > 0).to(dtype))
    x[0, 1, 2, 3] = torch.nan
    z = torch.ops.ccnet.abn_forward(x, normaliser_of(x), *options[1:3], rest, *options[4:])
    assert z.isnan().nonzero().tolist() == [[0, 1, 2, 3]]
    grad_x, _ = torch.ops.ccnet.abn_backward(x, z if residual else None, *kept[2:], *options)
    assert grad_x.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
def test_nan_and_infinity_stay_in_their_channel(each_target, layout, bad, activation):
    arguments = case((2, 33, 9, 10), torch.float32)
    good = run(activated_batch_norm, arguments, activation)
    arguments["x"][1, 7, 3, 3] = bad
    arguments["x"] = laid_out(arguments["x"], layout)
    others = [c for c in range(33) if c != 7]
    for name, x in run(activated_batch_norm, arguments, activation).items():
        dim = 1 if x.dim() == 4 else 0
        torch.testing.assert_close(
            x.index_select(dim, torch.tensor(others)), good[name].index_select(dim, torch.tensor(others))
        )
        if name in ("z", "running_var", "gradient of x"):
            assert x.select(dim, 7).isnan().any(), name


@pytest.mark.parametrize("kind", [ABN, InPlaceABN, partial(ABN, activation="relu")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [True, False])
def test_what_native_code_cannot_differentiate_is_an_error(kind, training, layout, residual):
    """And never 0; also of a loss that is linear in z, and for weight, bias and residual."""
    x, other, factor = (laid_out(torch.randn(2, 3, 4, 5, dtype=torch.float64), layout) for _ in range(3))
    module = kind(3).double().train(training)
    error = pytest.raises(NotImplementedError, match=r"has no .* in native code; libs\.reference\.activated_batch_norm")

    def loss(x, other=other):
        return (module(x * 1, other if residual else None) * factor).sum()

    with error:
        torch.autograd.functional.hessian(loss, x)
    with error:
        torch.func.hessian(loss)(x)
    with error:
        torch.func.jacrev(lambda x: module(x * 1))(x)
    with error:
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    inputs = {"x": x.requires_grad_(), **dict(module.named_parameters())}
    if residual:
        inputs["residual"] = other.requires_grad_()
    for name, tensor in inputs.items():
        (gradient,) = torch.autograd.grad(loss(x), tensor, create_graph=True)
        with error:  # as in a gradient penalty
            gradient.square().sum().backward()
            pytest.fail(name)
    before = module.running_mean.clone()
    with error:
        torch.func.jvp(loss, (x.detach(),), (factor,))
    if residual:
        with error:
            torch.func.jvp(lambda other: loss(x.detach(), other), (other.detach(),), (factor,))
    with error:
        torch.func.jvp(
            lambda weight: torch.func.functional_call(module, {"weight": weight}, (x.detach() * 1,)),
            (module.weight.detach(),),
            (torch.ones(3, dtype=torch.float64),),
        )
    with error, forward_ad.dual_level():
        module(forward_ad.make_dual(x.detach() * 1, factor))
    with error:
        torch.func.vmap(module)(x.detach()[None] * 1)
    assert torch.equal(module.running_mean, before)


@pytest.mark.parametrize("kind", [ABN, InPlaceABN])
@pytest.mark.parametrize("training", [True, False])
def test_first_derivatives_by_torch_func(kind, training):
    module = kind(3).double().train(training)
    x, factor = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad((module(leaf * 1) * factor).sum(), [leaf, *module.parameters()])
    mean = module.running_mean.clone()

    def loss(x, parameters):
        return (torch.func.functional_call(module, parameters, (x * 1,)) * factor).sum()

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    of_x, of_parameters = torch.func.grad(loss, argnums=(0, 1))(x, parameters)
    torch.testing.assert_close([of_x, *of_parameters.values()], list(expected))
    assert torch.equal(module.running_mean, mean) != training


def test_second_derivatives_of_compiled_code_are_an_error():
    module = torch.compile(ABN(3), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.hessian(lambda x: module(x).square().sum(), x)


@pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        *((torch.float32, layout, (2, 3, 4, 5)) for layout in LAYOUTS),
        *((dtype, "channels_last", (2, 3, 2, 3, 4)) for dtype in (torch.float64, torch.bfloat16)),
    ],
    ids=str,
)
def test_opcheck(dtype, layout, shape):
    """PyTorch's own checks of an operator: schema (what is written to), fake kernels (shapes, strides), tracing."""
    ops = torch.ops.ccnet
    arguments = case(shape, dtype)
    x, upstream = (laid_out(arguments[name], layout) for name in ("x", "upstream"))
    running = (arguments["running_mean"], arguments["running_var"])
    torch.library.opcheck(ops.abn_statistics, (x,))
    torch.library.opcheck(ops.abn_normaliser_of_batch_, (x, *running, 0.1, 1e-5))
    torch.library.opcheck(ops.abn_normaliser_of_parts_, (ops.abn_statistics(x)[None], *running, 0.1, 1e-5))
    torch.library.opcheck(ops.abn_normaliser_of_running, (*running, 1e-5))
    normaliser = ops.abn_normaliser_of_batch_(x, *running, 0.1, 1e-5)
    parameters, rest = (arguments["weight"], arguments["bias"]), laid_out(torch.randn(shape).to(dtype), "contiguous")
    for activation, residual in product(("leaky_relu", "relu"), (None, rest)):
        constants = (1e-5, activation, 0.01)
        torch.library.opcheck(ops.abn_forward, (x, normaliser, *parameters, residual, *constants))
        kept, inverted_with = (None, x), residual
        if activation == "relu":
            kept, inverted_with = (x, None if residual is None else upstream), None
        kept = (*kept, upstream, normaliser)
        options = (*parameters, inverted_with, *constants)
        torch.library.opcheck(ops.abn_backward_of_batch, (*kept, *options))
        torch.library.opcheck(ops.abn_backward_sums, (*kept, *options))
        for sums in (ops.abn_backward_sums(*kept, *options)[0], None):
            torch.library.opcheck(ops.abn_backward, (*kept, sums, *options))
    torch.library.opcheck(ops.abn_forward_, (x, normaliser, *parameters, None, 1e-5, "leaky_relu", 0.01))
    torch.library.opcheck(ops.abn_forward, (x, normaliser, None, None, None, 1e-5, "elu", 0.01))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), InPlaceABN(8), nn.Conv2d(8, 8, 3), InPlaceABN(8, activation="identity"), nn.ReLU()]
    layers += [nn.Conv2d(8, 4, 3), ABN(4, activation="relu")]
    return nn.Sequential(*layers, nn.Conv2d(4, 2, 3), ABN(2, activation="elu"))


def train(module, run, steps, size=(2, 3, 16, 16)):
    """Losses of some steps on random images, and the state dict."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        out = run(torch.randn(size, generator=generator))
        loss = sum(x.square().mean() + x.mean() for x in (out if isinstance(out, list) else [out]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module.state_dict()


def assert_trains_alike(make, compiled_as, **arguments):
    compiled, plain = make(), make()
    actual = train(compiled, torch.compile(compiled, **compiled_as), **arguments)
    expected = train(plain, plain, **arguments)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training):
    """Without graph breaks; the compiler sees the operators and what they write to."""
    assert_trains_alike(lambda: network().train(training), {"fullgraph": True, "backend": "aot_eager"}, steps=3)


def test_compiled_alone():
    """x is then an input of the graph."""
    module = InPlaceABN(3).double()
    x, upstream = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    gradients = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(leaf.clone()), [leaf, module.weight, module.bias], upstream))
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compiled_by_inductor():
    from torch._inductor import config  # not above: it takes a second

    with config.patch(compile_threads=1):  # otherwise it starts processes, for two kernels
        assert_trains_alike(network, {"fullgraph": True}, steps=3)


@pytest.mark.slow
def test_the_whole_network_compiled():
    def make():
        torch.manual_seed(0)
        return build_model("resnet18", num_classes=4).eval()  # eval: dropout draws other numbers when compiled

    assert_trains_alike(make, {"fullgraph": True, "backend": "aot_eager"}, steps=2, size=(2, 3, 33, 33))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The result has the convolution's dtype; parameters stay float32."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), InPlaceABN(8))
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    expected = F.leaky_relu(F.batch_norm(module[0](x), None, None, training=True))
    torch.testing.assert_close(y.float(), expected, atol=5e-2, rtol=0)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_inference_mode_and_no_grad():
    module = InPlaceABN(3)
    x = torch.randn(2, 3, 4, 4)
    expected = module(x.clone()).detach()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(module(x.clone()), expected)


def test_a_view_as_input():
    """Half of the channels of a tensor, normalised where they are; the gradient reaches the whole."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    whole, apart = x * 1, x * 1
    InPlaceABN(4).double()(whole[:, :4])
    expected = torch.cat([ABN(4).double()(apart[:, :4]), apart[:, 4:]], 1)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (whole, expected)))


def test_operators_called_directly_check_their_inputs():
    ops = torch.ops.ccnet
    x, w = torch.zeros(2, 3, 4, 4), torch.ones(3)
    statistics, normaliser = ops.abn_statistics(x), normaliser_of(x)
    options = (None, 1e-5, "leaky_relu", 0.01)
    of_relu = (None, 1e-5, "relu", 0.01)
    for call, message in [
        (lambda: ops.abn_statistics(w), r"x: expected \[N, C, ...\], got 1 dimensions"),
        (lambda: ops.abn_statistics(x.int()), "expected float32, float64, float16 or bfloat16"),
        (lambda: ops.abn_forward(x, normaliser[:2], w, w, *options), "normaliser: expected a number for each of 3"),
        (
            lambda: ops.abn_forward(x, normaliser, w[:2], w, *options),
            "weight: expected a number for each of 3 channels",
        ),
        (lambda: ops.abn_forward(x, normaliser, w, w.double(), *options), "bias: expected float64, or float32 for"),
        (
            lambda: ops.abn_forward(x, normaliser, w, w, None, 1e-5, "gelu", 0.1),
            "activation: expected leaky_relu, elu, relu, ident",
        ),
        (
            lambda: ops.abn_backward_sums(None, x, x[:1], normaliser, w, w, *options),
            "grad_z: expected the shape of the first tensor",
        ),
        (
            lambda: ops.abn_backward(None, x, x.half(), normaliser, None, w, w, *options),
            "grad_z: expected the first tensor's",
        ),
        (lambda: ops.abn_backward_of_batch(x, x, x, normaliser, w, w, *options), "expected z without x for the activ"),
        (lambda: ops.abn_backward_of_batch(None, x, x, normaliser, w, w, *of_relu), "expected x without residual for"),
        (
            lambda: ops.abn_normaliser_of_parts_(statistics[None], w, w[:2], 0.1, 1e-5),
            "running_var: expected the shape of the first",
        ),
        (
            lambda: ops.abn_normaliser_of_parts_(statistics, w, w, 0.1, 1e-5),
            r"parts: expected \[parts, 3, C\] in float64",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("operator", ["abn_normaliser_of_batch_", "abn_forward", "abn_backward_of_batch"])
def test_out_of_memory_of_a_gpu_is_pytorchs_error(operator, monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. (originally from torch_call_dispatcher)")

    monkeypatch.setattr(torch.ops.ccnet, operator, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 2"):
        ABN(3)(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
