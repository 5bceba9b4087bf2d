"""Activated batch norm against its formula, and synchronised over real processes against one with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gradients import assert_same_gradients

from libs import ABN, InPlaceABN, InPlaceABNSync

ACTIVATIONS = {
    "leaky_relu": lambda y: torch.where(y >= 0, y, 0.01 * y),
    "elu": lambda y: torch.where(y >= 0, y, y.exp() - 1),
    "identity": lambda y: y,
    "none": lambda y: y,
}


def by_formula(x, weight, bias, eps, activation):
    dims = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = x.mean(dims), x.var(dims, correction=0)
    xhat = (x - mean.view(shape)) / (var + eps).sqrt().view(shape)
    return ACTIVATIONS[activation](xhat * (weight.abs() + eps).view(shape) + bias.view(shape))


@pytest.mark.parametrize("kind", [ABN, InPlaceABN, InPlaceABNSync])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_matches_the_formula(kind, activation):
    module = kind(3, activation=activation).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.5, -0.7, 0.2]))  # a negative one: |weight| is used
        module.bias.normal_()
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    result, expected = module(x), by_formula(x, module.weight, module.bias, 1e-5, activation)
    torch.testing.assert_close(result, expected)
    assert_same_gradients(result, expected, {"x": x, "weight": module.weight, "bias": module.bias})


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


def test_state_dict_names():
    assert list(InPlaceABNSync(4).state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert list(InPlaceABN(4, affine=False).state_dict()) == ["running_mean", "running_var"]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="activation: expected one of leaky_relu, elu, identity, none, got 'gelu'"):
        ABN(3, activation="gelu")
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 3, ...\], got \[2, 4, 1, 1\]"):
        ABN(3)(torch.zeros(2, 4, 1, 1))


def _sync_worker(rank, sizes, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes))
    module, whole, upstream = _sync_case(sum(sizes))
    begin = sum(sizes[:rank])
    x = whole[begin : begin + sizes[rank]].clone().requires_grad_()
    y = module(x)
    y.backward(upstream[begin : begin + sizes[rank]])
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    torch.save(
        {"y": y.detach(), "x": x.grad, "weight": module.weight.grad, "bias": module.bias.grad,
         "mean": module.running_mean, "var": module.running_var},
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    dist.barrier()  # a process that leaves closes connections that another may still use
    dist.destroy_process_group()


def _sync_case(batch):
    torch.manual_seed(3)
    module = InPlaceABNSync(3).double()
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    return (
        module,
        5 + torch.randn(batch, 3, 2, 4, dtype=torch.float64),
        torch.randn(batch, 3, 2, 4, dtype=torch.float64),
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 3), (2, 0, 1)])
def test_synchronised_equals_one_process_with_the_whole_batch(sizes, tmp_path):
    mp.spawn(_sync_worker, args=(sizes, str(tmp_path)), nprocs=len(sizes))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(sizes))]
    module, x, upstream = _sync_case(sum(sizes))
    x.requires_grad_()
    y = module(x)
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
