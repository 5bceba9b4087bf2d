"""The native criss-cross attention: every instruction set and dtype against the reference in float64, and what PyTorch
does with operators: compiling, exporting, autocast, checks of its own."""

import itertools

import pytest
import torch
from attention import (
    DTYPES,
    TOLERANCE,
    assert_as_reference,
    assert_attention_as_reference,
    assert_close,
    assert_explicit_form_as_reference,
    assert_same_bits,
    everything,
    random_inputs,
    rounded_to_tf32,
    run,
    tf32,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out
from targets import (
    ALL_CAPABILITIES,
    DEVICES,
    EMULATED,
    TARGETS,
    best_capability,
    capability,
    running_on,
    running_on_device,
)
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cc_attention
from cc_attention import (
    CrissCrossAttention,
    CrissCrossAttention3d,
    ca_map,
    ca_weight,
    calling,
    criss_cross_attention,
    native,
    reference,
)


@pytest.fixture(params=DEVICES)
def ways(request):
    """The ways to run the operators on a device, as `running_on_device` gives them."""
    with running_on_device(request.param) as ways:
        yield ways


pytestmark = pytest.mark.skipif(not native.LOADED, reason="needs the native operators: pip install -e .")

LOW_PRECISION = [torch.bfloat16, torch.float16]


# Sizes on, below and above the vectors' lanes (4, 8, 16, and twice that in pairs), the tiles' 64 columns and 6 rows;
# and images of which every channel is whole pages of memory
SHAPES = [
    (1, 16, 64, 16, 32),
    (2, 3, 5, 7, 17),
    (1, 9, 65, 33, 6),
    (1, 33, 130, 1, 49),
    (1, 1, 1, 40, 1),
    (1, 64, 72, 9, 97),
    (1, 33, 70, 32, 64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(ways, dtype, shape):
    assert_attention_as_reference(random_inputs(*shape, scale=0.5, residual=True), dtype, ways)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 17), (1, 9, 65, 33, 6), (1, 6, 7, 1, 20)], ids=str)
def test_explicit_form(ways, dtype, shape):
    assert_explicit_form_as_reference(random_inputs(*shape, scale=0.5), dtype, ways=ways)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 3, 4, 17), (1, 8, 16, 6, 1, 5), (1, 2, 3, 4, 1, 1)], ids=str)
def test_three_dimensions(ways, dtype, shape):
    assert_attention_as_reference(random_inputs(*shape, scale=0.5), dtype, ways)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pixels", "cv"), [((2, 300), 5), ((530, 1), 5), ((300, 3), 70), ((257, 2), 5), ((1, 273), 3)])
def test_lines_longer_than_a_block_of_queries(ways, dtype, pixels, cv):
    inputs = random_inputs(1, 5, cv, *pixels)
    assert_attention_as_reference(inputs, dtype, ways)
    assert_explicit_form_as_reference(inputs, dtype, ways=ways)


layouts = st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"])


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 2),
    c=st.integers(0, 40),
    cv=st.integers(0, 70),
    pixels=st.lists(st.integers(1, 35), min_size=2, max_size=2) | st.lists(st.integers(1, 9), min_size=3, max_size=3),
    layout=st.tuples(layouts, layouts, layouts, layouts),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_layout_and_dtype(device, n, c, cv, pixels, layout, residual, dtype):
    torch.manual_seed(0)  # an example that fails can be had again
    with running_on_device(device) as ways:
        inputs = random_inputs(n, c, cv, *pixels, scale=0.5, residual=residual)
        inputs |= {name: laid_out(inputs[name], how) for name, how in zip(inputs, layout, strict=False)}
        assert_attention_as_reference(inputs, dtype, ways)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(0, 2),
    c=st.integers(0, 40),
    cv=st.integers(0, 70),
    pixels=st.lists(st.integers(1, 35), min_size=2, max_size=2),
    layout=st.tuples(layouts, layouts, layouts),
    dtype=st.sampled_from(DTYPES),
)
def test_explicit_form_of_any_shape_layout_and_dtype(device, n, c, cv, pixels, layout, dtype):
    torch.manual_seed(0)  # an example that fails can be had again
    with running_on_device(device) as ways:
        inputs = random_inputs(n, c, cv, *pixels, scale=0.5)
        inputs = {key: laid_out(x, how) for (key, x), how in zip(inputs.items(), layout, strict=True)}
        assert_explicit_form_as_reference(inputs, dtype, layout[0], ways)


def assert_errors_at_most_twice_those_of_pytorch(native_function, function, inputs, dtype, ways):
    """Of the reference in the same dtype, both against float64: norms over all elements.

    Up to rounding in the last place of the result itself, where PyTorch happens to be exact.
    """
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    upstream = torch.randn(function(**inputs).shape).to(dtype)
    exact = run(function, {name: x.double() for name, x in inputs.items()}, upstream.double())
    plain = run(function, inputs, upstream)
    for way in ways:
        with way():
            ours = run(native_function, inputs, upstream)
        for name, wanted in exact.items():
            error, of_plain = ((x[name].double() - wanted).norm() for x in (ours, plain))
            assert error <= 2 * of_plain + torch.finfo(dtype).eps * wanted.norm(), f"{name}: {error} and {of_plain}"


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 64, 96, 33, 29), (2, 8, 16, 12, 40), (1, 16, 24, 5, 6, 17), (1, 8, 16, 2, 700)], ids=str
)
def test_errors_are_at_most_twice_those_of_pytorch(ways, dtype, shape):
    inputs = random_inputs(*shape, scale=0.4)
    assert_errors_at_most_twice_those_of_pytorch(
        criss_cross_attention, reference.criss_cross_attention, inputs, dtype, ways
    )
    if len(shape) == 5:
        value = inputs.pop("value")
        weight = reference.ca_weight(**inputs).softmax(1)
        assert_errors_at_most_twice_those_of_pytorch(ca_weight, reference.ca_weight, inputs, dtype, ways)
        assert_errors_at_most_twice_those_of_pytorch(
            ca_map, reference.ca_map, {"weight": weight, "value": value}, dtype, ways
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0, 1, 8])
def test_huge_energies(ways, dtype, spread):
    """Energies of 1e4, equal or a little or much apart: results and gradients are as exact as those of small ones."""
    inputs = random_inputs(1, 1, 8, 20, 18)
    # Energies are 64 * 160 + query * key, whole numbers that are exact in every dtype's sums.
    inputs["query"] = torch.randint(-1, 2, (1, 1, 20, 18)).double()
    inputs["key"] = spread * torch.randint(-3, 4, (1, 1, 20, 18)).double()

    def with_huge_energies(function):
        def run_function(query, key, **value):
            huge = [torch.cat([torch.full_like(x, by), x], 1) for x, by in ((query, 64), (key, 160))]
            return function(*huge, **value)

        return run_function

    attention = [with_huge_energies(f) for f in (criss_cross_attention, reference.criss_cross_attention)]
    assert_as_reference(*attention, inputs, dtype, ways)
    del inputs["value"]
    assert_as_reference(*(with_huge_energies(f) for f in (ca_weight, reference.ca_weight)), inputs, dtype, ways)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, -INF, INF], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_propagate_as_in_the_reference(ways, dtype, bad, where):
    """A bad pixel, and a whole bad row: what is NaN or infinite is so in both, what is finite agrees."""
    for pixels, rows in (((7, 19), slice(3, 4)), ((7, 19), slice(None)), ((3, 6, 5), slice(2, 3))):
        inputs = {name: x.abs().to(dtype).double() for name, x in random_inputs(1, 5, 6, *pixels, scale=0.5).items()}
        inputs[where][0, :, ..., rows, 2] = bad
        inputs[where][0, 1, ..., 4, :] = bad
        upstream = torch.randn(inputs["value"].shape).to(dtype)
        expected = run(reference.criss_cross_attention, inputs, upstream.double())
        tolerance = {"atol": TOLERANCE[dtype] * 10, "rtol": TOLERANCE[dtype]}
        for way in ways:
            with way():
                actual = run(criss_cross_attention, {k: x.to(dtype) for k, x in inputs.items()}, upstream)
            for name, wanted in expected.items():
                assert torch.equal(actual[name].isnan(), wanted.isnan()), name
                torch.testing.assert_close(actual[name].double(), wanted, **tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_minus_infinity_leaves_the_column(each_target, dtype):
    """Keys of one row are -inf: its pixels attend to their columns only, which have other keys. And none is NaN."""
    inputs = random_inputs(1, 3, 4, 5, 18, scale=0.5)
    inputs["query"] = inputs["query"].abs() + 0.1
    inputs["key"][0, :, 2] = -INF
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    out = criss_cross_attention(**inputs)
    expected = reference.criss_cross_attention(**{name: x.double() for name, x in inputs.items()})
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [*ALL_CAPABILITIES, "cuda"])  # the emulator's: test_cuda_kernels.py
def test_same_bits_for_any_number_of_threads_and_in_every_run(target, dtype):
    before = torch.get_num_threads()
    results = []
    with running_on(target):
        inputs = {name: x.to(dtype) for name, x in random_inputs(2, 16, 33, 19, 23).items()}
        in_3d = {name: x.to(dtype) for name, x in random_inputs(2, 16, 33, 3, 9, 13).items()}
        try:
            for threads in (1, 2, 3, 8, 2):
                torch.set_num_threads(threads)
                results.append(list(everything(inputs, in_3d)))
        finally:
            torch.set_num_threads(before)
    assert_same_bits(results)


@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(target):
    def inputs(*pixels):
        return [x.requires_grad_() for x in random_inputs(2, 3, 4, *pixels).values()]

    def check(function, inputs):  # in fast mode, derivatives along one random direction: fewer calls
        assert torch.autograd.gradcheck(function, inputs, fast_mode=target == "emulated")

    with running_on(target):
        check(criss_cross_attention, inputs(3, 4))
        check(criss_cross_attention, inputs(2, 3, 2))
        query, key, value = inputs(3, 4)
        check(ca_weight, (query, key))
        check(ca_map, (torch.rand(2, 6, 3, 4, dtype=torch.float64, requires_grad=True), value))


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_gradient_of_one_input_only(wanted):
    inputs = random_inputs(1, 3, 4, 5, 6)
    inputs[wanted].requires_grad_()
    upstream = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    functions = (criss_cross_attention, reference.criss_cross_attention)
    gradients = [torch.autograd.grad(function(**inputs), inputs[wanted], upstream)[0] for function in functions]
    torch.testing.assert_close(*gradients)


def test_second_derivatives_are_an_error():
    query, key, value = (x.requires_grad_() for x in random_inputs(1, 2, 3, 3, 4).values())
    for out, x, name in [
        (criss_cross_attention(query, key, value), value, "criss_cross_attention"),
        (ca_weight(query, key), query, "ca_weight"),
        (ca_map(torch.rand(1, 6, 3, 4, dtype=torch.float64), value), value, "ca_map"),
    ]:
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=rf"{name} has no second derivatives.*reference\.{name}"):
            gradient.square().sum().backward()


FORMATS = {
    "NCHW": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other row": lambda x: torch.stack([x, x], dim=3).flatten(2, 3)[:, :, ::2],
    "every other row, channels_last": lambda x: FORMATS["channels_last"](torch.stack([x, x], 3).flatten(2, 3))[
        :, :, ::2
    ],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("target", [best_capability(), EMULATED, "cuda"])
def test_results_and_gradients_have_the_memory_format_of_their_inputs(target):
    """Those that a convolution's result has, mixed formats included, and where shapes leave it open."""

    def strides(x):
        if x.dim() == 4:
            return torch.nn.Conv2d(x.shape[1], x.shape[1], 1)(x).stride()
        return torch.empty(x.shape, memory_format=suggest_memory_format(x)).stride()

    formats = [*zip(FORMATS, FORMATS, strict=True), ("NCHW", "channels_last"), ("channels_last", "NCHW")]
    with running_on(target):
        for pixels, channels in itertools.product([(5, 6), (1, 1), (1, 4), (3, 1), (2, 3, 4), (1, 1, 1)], [1, 3]):
            inputs = {name: x.float() for name, x in random_inputs(2, channels, channels, *pixels).items()}
            for layout, other in formats:
                laid = {name: FORMATS[layout](x) for name, x in inputs.items()}
                laid["key"] = FORMATS[other](inputs["key"])
                upstream = torch.randn_like(inputs["value"])
                results = run(criss_cross_attention, laid, upstream)
                assert_close(results, run(reference.criss_cross_attention, laid, upstream), 1e-5)
                for name, x in {"out": laid["value"], **{f"gradient of {name}": x for name, x in laid.items()}}.items():
                    assert results[name].stride() == strides(x), f"{name} {pixels} {channels} {layout} {other}"


@pytest.mark.parametrize("layout", FORMATS)
def test_the_explicit_form_has_the_memory_format_of_its_inputs(layout):
    query, key, value = (FORMATS[layout](x) for x in random_inputs(2, 3, 4, 5, 6).values())
    for name, x in run(ca_weight, {"query": query, "key": key}, torch.randn(2, 10, 5, 6)).items():
        assert x.is_contiguous(memory_format=suggest_memory_format(query)), name
    weight = torch.rand(2, 10, 5, 6, dtype=torch.float64)
    for name, x in run(ca_map, {"weight": weight, "value": value}, torch.randn(2, 4, 5, 6)).items():
        assert x.is_contiguous(memory_format=suggest_memory_format(weight if "weight" in name else value)), name


def test_a_module_is_dropped_into_a_network_of_nchw_tensors():
    assert CrissCrossAttention(16)(torch.randn(2, 16, 3, 5)).view(2, -1).shape == (2, 240)
    assert CrissCrossAttention3d(16)(torch.randn(2, 16, 2, 3, 5)).view(2, -1).shape == (2, 480)


def test_nchw_in_many_groups_of_lines():
    """More threads than groups, images of several groups, rows shorter than a cache line; the same bits for all."""
    before = torch.get_num_threads()
    for pixels in [(3, 100), (100, 3), (2, 3, 40), (40, 2, 3)]:
        inputs = {name: x.float() for name, x in random_inputs(2, 5, 70, *pixels, scale=0.5).items()}
        upstream = torch.randn_like(inputs["value"])
        last = {name: FORMATS["channels_last"](x) for name, x in inputs.items()}
        wanted = run(criss_cross_attention, last, upstream)
        try:
            for threads in (1, 3, 8):
                torch.set_num_threads(threads)
                for name, x in run(criss_cross_attention, inputs, upstream).items():
                    assert torch.equal(x, wanted[name]), f"{name} {pixels} {threads}"
        finally:
            torch.set_num_threads(before)


def dual(function, x):
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


FORWARD_MODE = {
    "dual": dual,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "jvp of vmap": lambda function, x: torch.func.jvp(torch.func.vmap(function), (x[None],), (x[None],)),
    "grad of jvp": lambda function, x: torch.func.grad(lambda y: torch.func.jvp(function, (y,), (x,))[1].sum())(x),
}


@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode_derivatives_are_an_error(mode):
    """Never silently 0: with dual tensors, torch.func's transforms, and these around or inside others."""
    query, key, value = random_inputs(1, 2, 3, 3, 4).values()
    weight = torch.rand(1, 6, 3, 4, dtype=torch.float64)
    module = CrissCrossAttention(8).double().requires_grad_(False)
    for name, function, x in [
        ("criss_cross_attention", lambda x: criss_cross_attention(query, key, x), value),
        ("ca_weight", lambda x: ca_weight(x, key), query),
        ("ca_map", lambda x: ca_map(weight, x), value),
        ("criss_cross_attention", module, torch.randn(1, 8, 3, 4, dtype=torch.float64)),
    ]:
        with pytest.raises(NotImplementedError, match=rf"{name} has no forward-mode.*reference\.{name}"):
            FORWARD_MODE[mode](function, x)


TRANSFORMS = {
    "vmap": lambda function, *inputs: torch.func.vmap(function)(*inputs),
    "vmap of vmap": lambda function, *inputs: torch.func.vmap(torch.func.vmap(function))(*(x[None] for x in inputs)),
    "vmap of another dimension": lambda function, *inputs: torch.func.vmap(function, 1, 2)(
        *(x.transpose(0, 1) for x in inputs)
    ),
    "vmap with one for all": lambda function, *inputs: torch.func.vmap(function, (None, *(0 for _ in inputs[1:])))(
        inputs[0][0], *inputs[1:]
    ),
    "grad": lambda function, *inputs: torch.func.grad(lambda *x: function(*x).square().sum())(*(x[0] for x in inputs)),
    "vmap of grad": lambda function, *inputs: torch.func.vmap(torch.func.grad(lambda *x: function(*x).square().sum()))(
        *inputs
    ),
    "grad of vmap": lambda function, *inputs: torch.func.grad(
        lambda *x: torch.func.vmap(function)(*x).square().sum(), argnums=tuple(range(len(inputs)))
    )(*inputs),
    "vjp": lambda function, *inputs: torch.func.vjp(function, *(x[0] for x in inputs))[1](
        function(*(x[0] for x in inputs))
    ),
    "jacrev": lambda function, *inputs: torch.func.jacrev(function)(*(x[0] for x in inputs)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", ["criss_cross_attention", "three dimensions", "ca_weight", "ca_map"])
def test_transforms_of_torch_func(operator, transform):
    """vmap, and first derivatives around and inside of it."""
    pixels = (2, 3, 2) if operator == "three dimensions" else (3, 4)
    name = "criss_cross_attention" if operator == "three dimensions" else operator
    channels = {"ca_weight": (2, 2), "ca_map": (6, 5)}.get(operator, (2, 2, 5))
    inputs = [torch.randn(3, 2, c, *pixels, dtype=torch.float64) for c in channels]
    actual, expected = (
        TRANSFORMS[transform](getattr(module, name), *inputs) for module in (cc_attention, cc_attention.reference)
    )
    torch.testing.assert_close(actual, expected)


def test_vmap_calls_the_operator_once():
    """Also over the parameters of a module, as an ensemble does."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    modules = [CrissCrossAttention(8) for _ in range(3)]
    for module in modules:
        torch.nn.init.constant_(module.gamma, 0.7)
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 8, 5, 6)

    def of_one(parameters, x):
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))

    with Watch():
        out = torch.func.vmap(of_one, (0, None))(parameters, x)
    assert called.count("ccnet.criss_cross_attention.default") == 1
    torch.testing.assert_close(out, torch.stack([module(x) for module in modules]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["hessian", "jacrev of jacrev", "jvp of grad", "grad of grad"])
def test_transforms_beyond_are_an_error_too(transform):
    query, key, value = random_inputs(1, 2, 3, 3, 4).values()

    def function(x):
        return criss_cross_attention(query, key, x).square().sum()

    func = torch.func
    call = {
        "hessian": lambda: func.hessian(function)(value),
        "jacrev of jacrev": lambda: func.jacrev(func.jacrev(function))(value),
        "jvp of grad": lambda: func.jvp(func.grad(function), (value,), (value,)),
        "grad of grad": lambda: func.grad(lambda x: func.grad(function)(x).square().sum())(value),
    }[transform]
    with pytest.raises(NotImplementedError, match=r"criss_cross_attention has no .* derivatives.*reference\.criss"):
        call()


def test_no_gradients_are_made_of_largest_and_sum():
    """Their zeros would be a map each."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = [x.requires_grad_() for x in random_inputs(1, 2, 3, 3, 4).values()]
    out = criss_cross_attention(*inputs)
    upstream = torch.randn_like(out)
    with Watch():
        torch.autograd.grad(out, inputs, upstream)
    assert not [name for name in made if "zeros" in name or "full" in name], made


@pytest.mark.parametrize("operator", ["criss_cross_attention", "ca_weight", "ca_map"])
def test_out_of_memory_of_a_gpu_is_pytorchs_error(operator, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. (originally from torch_call_dispatcher)")

    x = torch.zeros(1, 6, 3, 4, requires_grad=True)
    arguments = (x, x, x) if operator == "criss_cross_attention" else (x, x)
    function = getattr(cc_attention, operator)
    out = function(*arguments)
    monkeypatch.setattr(torch.ops.ccnet, operator, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 2"):
        function(*arguments)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory") as error:
        calling.call(torch.empty, 2**60)
    assert not isinstance(error.value, torch.OutOfMemoryError)
    assert out.shape == (1, 6, 3, 4)


@pytest.mark.parametrize(
    ("dtype", "layout", "pixels"),
    [
        *((dtype, "contiguous", (4, 5)) for dtype in DTYPES),
        *((torch.float32, layout, (4, 5)) for layout in ("channels_last", "sliced")),
        *((torch.float32, "channels_last", pixels) for pixels in ((2, 3, 4), (1, 6))),
    ],
    ids=str,
)
def test_opcheck(device, dtype, layout, pixels):
    """PyTorch's own checks of an operator: schema, autograd registration, fake kernels (shapes, strides), tracing."""

    def of(*shape):
        return laid_out(torch.randn(shape).to(device, dtype), layout)

    ops = torch.ops.ccnet
    query, key, value = (of(2, c, *pixels).requires_grad_() for c in (3, 3, 5))
    gamma = torch.randn(1, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(ops.criss_cross_attention, (query, key, value))
    options = (of(2, 5, *pixels), gamma.requires_grad_(), True)  # the last of all: allow_tf32
    torch.library.opcheck(ops.criss_cross_attention, (query, key, value, *options))
    detached = (query.detach(), key.detach(), value.detach())
    backward_inputs = (of(2, 5, *pixels), *detached, *ops.criss_cross_attention(*detached)[1:], gamma.detach(), True)
    torch.library.opcheck(ops.criss_cross_attention_backward, backward_inputs)
    if len(pixels) == 2:
        path = sum(pixels) - 1
        weight = of(2, path, *pixels)
        torch.library.opcheck(ops.ca_weight, (query, key))
        torch.library.opcheck(ops.ca_weight_backward, (of(2, path, *pixels), query.detach(), key.detach(), True))
        torch.library.opcheck(ops.ca_map, (weight.requires_grad_(), value, True))
        torch.library.opcheck(ops.ca_map_backward, (of(2, 5, *pixels), weight.detach(), value.detach()))


def module_and_input(kind, device, *pixels):
    module = kind(16).to(device)
    module.gamma.data.fill_(0.7)
    return module, torch.randn(2, 16, *pixels, device=device)


@pytest.mark.parametrize(("kind", "pixels"), [(CrissCrossAttention, (6, 7)), (CrissCrossAttention3d, (3, 4, 5))])
def test_compiled_whole(device, kind, pixels):
    module, x = module_and_input(kind, device, *pixels)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = {"x": x, **dict(module.named_parameters())}
    expected = module(x.requires_grad_())
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(inputs.values()), upstream)
    actual = compiled(x)
    torch.testing.assert_close(actual, expected)
    for name, a, b in zip(inputs, torch.autograd.grad(actual, list(inputs.values()), upstream), wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_by_inductor_with_other_sizes_later(device, autocast):
    module, _ = module_and_input(CrissCrossAttention, device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    tolerance = {"atol": 3e-2, "rtol": 3e-2} if autocast else {}  # compiled code rounds to bfloat16 elsewhere
    for pixels in [(6, 7), (9, 5), (4, 4)]:
        x = torch.randn(2, 16, *pixels, device=device, requires_grad=True)
        inputs = {"x": x, **dict(module.named_parameters())}
        upstream = torch.randn_like(x)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            results = [function(x) for function in (compiled, module)]
        torch.testing.assert_close(*results, **tolerance)
        gradients = [torch.autograd.grad(result, list(inputs.values()), upstream) for result in results]
        for name, a, b in zip(inputs, *gradients, strict=True):
            # A bias of the keys adds the same to all energies of a query, so its gradient is 0 but for rounding.
            exact = dict(zip(inputs, gradients[1], strict=True))["key_conv.weight"] if name == "key_conv.bias" else b
            difference = (a - b).norm() / exact.norm()
            assert difference <= (3e-2 if autocast else 1e-5), f"{name}: {difference}"


def test_two_passes_save_their_inputs_and_two_numbers_a_pixel(device):
    """Under autocast: x, query, key and value in bfloat16 of each pass; no result, and nothing of gamma's sum."""
    n, channels, h, w = 2, 64, 12, 9
    module = CrissCrossAttention(channels).to(device)
    weights = {p.data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        kept.append(x)  # so that no other storage has its address
        return x

    kept: list[torch.Tensor] = []
    x = torch.randn(n, channels, h, w, device=device, dtype=torch.bfloat16, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast(device, dtype=torch.bfloat16),
    ):
        out = module(module(x))
    cast_weights = 2 * sum(p.numel() for p in module.parameters())
    found = sum(size for address, size in saved.items() if address not in weights)
    of_maps = 2 * n * h * w * (2 * (channels + 2 * channels // 8 + channels) + 2 * 4)
    assert out.dtype == torch.bfloat16
    assert of_maps <= found <= of_maps + cast_weights + 2 * 2 * 4  # gamma of each pass


def test_exported(device):
    module, x = module_and_input(CrissCrossAttention, device, 6, 7)
    sizes = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,)).module()
    for pixels in [(6, 7), (9, 5)]:
        x = torch.randn(2, 16, *pixels, device=device)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast(device, dtype):
    """Operators run in autocast's dtype, whatever their inputs are; gradients have the inputs' dtypes."""
    inputs = {name: x.to(device, torch.float32) for name, x in random_inputs(1, 4, 6, 8, 9, scale=0.5).items()}
    inputs["key"] = inputs["key"].to(dtype)
    ones = torch.ones(1, 6, 8, 9, device=device)
    with torch.autocast(device, dtype=dtype):
        actual = run(criss_cross_attention, inputs, ones)
        weight = ca_weight(inputs["query"], inputs["key"])
        mapped = ca_map(weight.float(), inputs["value"])
        exact = criss_cross_attention(*(x.double() for x in inputs.values()))
    assert actual["out"].dtype == weight.dtype == mapped.dtype == dtype
    assert exact.dtype == torch.float64
    assert [actual[f"gradient of {name}"].dtype for name in inputs] == [x.dtype for x in inputs.values()]
    expected = run(criss_cross_attention, {k: x.to(dtype) for k, x in inputs.items()}, ones)
    for name, x in expected.items():
        assert torch.equal(actual[name].to(dtype), x), name


def test_module_under_autocast_has_its_dtype_and_trains(device):
    module, x = module_and_input(CrissCrossAttention, device, 6, 7)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = module(module(x))
        assert out.dtype == module.value_conv(x).dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


def test_inference_mode_and_no_grad():
    inputs = random_inputs(1, 3, 4, 5, 6)
    expected = reference.criss_cross_attention(**inputs)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(criss_cross_attention(**inputs), expected)


def test_on_the_meta_device_there_are_shapes_only():
    query, value = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 6, 4, 5, device="meta")
    weight = ca_weight(query, query)
    assert weight.shape == (2, 8, 4, 5)
    assert criss_cross_attention(query, query, value).shape == ca_map(weight, value).shape == (2, 6, 4, 5)


def test_operators_called_directly_check_their_inputs(device):
    ops = torch.ops.ccnet
    x, y = torch.zeros(1, 2, 3, 4, device=device), torch.zeros(1, 2, 3, 5, device=device)
    for call, message in [
        (lambda: ops.criss_cross_attention(x, y, x), r"key: expected shape \[1, 2, 3, 4\], got \[1, 2, 3, 5\]"),
        (lambda: ops.criss_cross_attention(x, x, y), r"value: expected shape \[1, 2, 3, 4\]"),
        (lambda: ops.criss_cross_attention(x, x, x.double()), "value: expected the first tensor's dtype"),
        (lambda: ops.criss_cross_attention(x[0], x[0], x[0]), r"query: expected \[N, C, H, W\] or \[N, C, D, H, W\]"),
        (lambda: ops.ca_weight(x.int(), x.int()), "expected float32, float64, float16 or bfloat16"),
        (lambda: ops.ca_map(x, x), r"weight: expected shape \[1, 6, 3, 4\]"),
        (
            lambda: ops.ca_map_backward(y, torch.zeros(1, 6, 3, 4, device=device), x),
            r"grad_out: expected shape \[1, 2, 3, 4\]",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_unknown_capability_is_an_error():
    with capability("sse9"), pytest.raises(RuntimeError, match="CCNET_CPU_CAPABILITY=sse9: expected baseline, avx2"):
        native.cpu_capability()


@pytest.mark.parametrize(
    ("operator", "pixels"),
    [
        ("criss_cross_attention", (5, 6)),
        ("criss_cross_attention", (2, 5, 6)),
        ("ca_weight", (5, 6)),
        ("ca_map", (5, 6)),
    ],
)
def test_floating_point_operations_are_those_of_the_plain_form(operator, pixels):
    """Forward and backward, as torch.utils.flop_counter counts them."""
    sizes = {"criss_cross_attention": (4, 4, 6), "ca_weight": (4, 4), "ca_map": (10, 6)}[operator]

    def counted(function):
        inputs = [torch.rand(2, channels, *pixels, requires_grad=True) for channels in sizes]
        with FlopCounterMode(display=False) as counter:
            forward = function(*inputs)
            after_forward = counter.get_total_flops()
            forward.sum().backward()
        return after_forward, counter.get_total_flops() - after_forward

    forward, backward = counted(getattr(cc_attention, operator))
    assert (forward, backward) == counted(getattr(cc_attention.reference, operator))
    assert backward == 2 * forward > 0


# ---- float32 as TF32, on GPUs ----


@pytest.fixture(params=[EMULATED, "cuda"])
def as_tf32(request):
    with running_on(request.param), tf32("fp32_precision"):
        if request.param == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("needs a GPU of sm_80 or newer")
        yield


@pytest.mark.usefixtures("as_tf32")
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7, 17), (1, 64, 72, 2, 97), (1, 33, 70, 65, 2), (1, 9, 8, 2, 133), (1, 5, 9, 3, 4, 7), (1, 8, 9, 1, 1)],
    ids=str,
)
def test_tf32_has_its_precision(shape):
    """Two products, one after the other, of inputs that are rounded by 2^-11 of themselves."""
    inputs = {name: x.float() for name, x in random_inputs(*shape, scale=0.4, residual=True).items()}
    exact = {name: x.double() for name, x in inputs.items()}
    attended = reference.criss_cross_attention(exact["query"], exact["key"], exact["value"])
    upstream = attended.float()  # with which gamma's gradient is a sum of squares, and not of numbers that cancel
    expected = run(reference.criss_cross_attention, exact, upstream.double())
    assert_close(run(criss_cross_attention, inputs, upstream), expected, 2**-9)


@pytest.mark.usefixtures("as_tf32")
def test_tf32_rounds_what_is_multiplied_once_and_to_nearest():
    """Of a path of one pixel and one channel all products are exact in float32."""
    x, y, upstream = torch.randn(3, 500, 1, 1, 1).unbind()
    x[0], x[1] = 1 + 2**-11, -1 - 2**-11  # ties
    a, b, grad = map(rounded_to_tf32, (x, y, upstream))
    for function, names in ((ca_weight, ("query", "key")), (ca_map, ("weight", "value"))):
        found = run(function, dict(zip(names, (x, y), strict=True)), upstream)
        for name, wanted in zip(found, (a * b, grad * b, a * grad), strict=True):
            assert torch.equal(found[name], wanted), f"{function.__name__}: {name}"


@pytest.mark.usefixtures("as_tf32")
@pytest.mark.parametrize("bad", [NAN, -INF, INF], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_tf32_keeps_nan_and_infinity(where, bad):
    inputs = {name: x.abs().float() for name, x in random_inputs(1, 5, 6, 7, 19, scale=0.5).items()}
    inputs[where][0, :, 3, 2] = bad
    inputs[where][0, 1, :, 4] = bad
    if bad != bad:  # all bits set, as GPUs make them: what would carry into the sign, were it rounded
        inputs[where] = inputs[where].view(torch.int32).where(~inputs[where].isnan(), 0x7FFFFFFF).view(torch.float32)
    upstream = torch.randn(inputs["value"].shape)
    actual = run(criss_cross_attention, inputs, upstream)
    exact = {name: x.double() for name, x in inputs.items()}
    for name, wanted in run(reference.criss_cross_attention, exact, upstream.double()).items():
        torch.testing.assert_close(actual[name].double(), wanted, atol=2e-2, rtol=4e-3, equal_nan=True, msg=name)


class Told(TorchDispatchMode):
    """Of each operator of ours that runs, whether it is told that TF32 is allowed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ccnet":
            names = [argument.name for argument in function._schema.arguments]
            self.seen.append((dict(zip(names, args, strict=False)) | (kwargs or {})).get("allow_tf32", False))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["fp32_precision", "allow_tf32", "high", "medium"])
def test_operators_are_told_whether_tf32_is_allowed(how):
    """The backward pass of what the forward pass was told; also where vmap or autocast call them."""
    x = torch.rand(2, 6, 3, 4, requires_grad=True)

    def forward():
        yield criss_cross_attention(x, x, x)
        yield criss_cross_attention(x, x, x, x, torch.ones(1))
        yield ca_weight(x, x)
        yield ca_map(x, x)
        yield torch.func.vmap(criss_cross_attention)(*[x[None]] * 4, torch.ones(1, 1))
        yield torch.func.vmap(ca_map)(x[None], x[None])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield criss_cross_attention(x, x, x)
            yield ca_weight(x, x)

    with Told() as told:
        with tf32(how):
            results = list(forward())
        sum(result.sum() for result in results).backward()
        assert told.seen == [True] * 16
        list(forward())
        assert told.seen[16:] == [False] * 8
