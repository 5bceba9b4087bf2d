"""The losses against PyTorch's cross-entropy and against the original's OHEM on the host."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gradients import assert_same_gradients
from programs import distributed_processes
from scipy import ndimage
from torch.nn import functional as F

from dataset import shard
from networks import BatchShard
from utils.criterion import CriterionDSN, CriterionOhemDSN, upsample


def random_case(n=2, k=5, h=41, w=57, sharpness=3.0, void=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    main = sharpness * torch.randn(n, k, h // 8 + 1, w // 8 + 1, generator=generator, dtype=torch.float64)
    auxiliary = torch.randn(main.shape, generator=generator, dtype=torch.float64)
    target = torch.randint(k, (n, h, w), generator=generator)
    target[torch.rand(n, h, w, generator=generator) < void] = 255
    return [main.requires_grad_(), auxiliary.requires_grad_()], target.to(torch.uint8)


def plain(logits, target, weight=None):
    return F.cross_entropy(upsample(logits, target.shape[1:]), target.long(), weight, ignore_index=255)


def class_weight(k=5):
    return torch.logspace(-2, 2, k, dtype=torch.float64).flip(0)


def test_dsn_is_the_sum_of_cross_entropies():
    preds, target = random_case()
    loss = CriterionDSN(255)(preds, target)
    expected = plain(preds[0], target) + 0.4 * plain(preds[1], target)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(loss, expected, dict(zip(("main", "auxiliary"), preds, strict=True)))


def weighted_mean(losses, weights):
    return (losses * weights).sum() / weights.sum()


@pytest.mark.parametrize("absent", [None, 2])
def test_weighted_losses_are_the_sum_over_the_sum_of_weights(absent):
    preds, target = random_case()
    target[target == absent] = 255
    weight = class_weight()
    losses = CriterionDSN(weight=weight).losses(preds, target)
    expected = []
    for logits in preds:
        probability = upsample(logits, target.shape[1:]).softmax(1)
        pixels = [(n, int(target[n, i, j]), i, j) for n, i, j in (target != 255).nonzero().tolist()]
        pixel_losses = -torch.stack([probability[pixel] for pixel in pixels]).log()
        expected.append(weighted_mean(pixel_losses, weight[[pixel[1] for pixel in pixels]]))
    torch.testing.assert_close(losses.stacked(), torch.stack([expected[0] + 0.4 * expected[1], *expected]))
    torch.testing.assert_close(losses.total, plain(preds[0], target, weight) + 0.4 * plain(preds[1], target, weight))
    assert_same_gradients(
        losses.total, expected[0] + 0.4 * expected[1], dict(zip(("main", "auxiliary"), preds, strict=True))
    )


def test_a_sum_of_weights_below_1_is_divided_by():
    preds, target = random_case()
    target[:] = 255
    target[0, 3, 5] = 4  # of weight 0.01
    torch.testing.assert_close(CriterionDSN(weight=class_weight())(preds, target), CriterionDSN()(preds, target))


@pytest.mark.parametrize(
    "criterion",
    [CriterionDSN(), CriterionOhemDSN(0.7, 64), CriterionDSN(weight=class_weight()),
     CriterionOhemDSN(0.7, 64, weight=class_weight())],
)  # fmt: skip
def test_all_void_gives_zero_and_no_nan(criterion):
    preds, target = random_case(void=1.1)
    loss = criterion(preds, target)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, preds))


def ohem_threshold_on_the_host(probability, target, thresh, min_kept):
    """The recipe's threshold with NumPy and SciPy. probability [N, K, H, W], target [N, H, W]."""
    small = ndimage.zoom(probability, (1, 1, 1 / 8, 1 / 8), order=1)
    labels = ndimage.zoom(target, (1, 1 / 8, 1 / 8), order=0)
    valid = labels != 255
    k = min_kept // 64
    if k >= valid.sum():
        return 1.0
    n, i, j = np.nonzero(valid)
    true_class = small[n, labels[valid], i, j]
    return thresh if k == 0 else max(thresh, np.partition(true_class, k - 1)[k - 1])


@pytest.mark.parametrize(
    ("thresh", "min_kept", "case"),
    [
        (0.3, 0, {}),  # the threshold alone
        (0.05, 64 * 20, {}),  # the k-th smallest decides
        (0.9, 64 * 5, {}),  # the threshold is above the k-th smallest
        (0.3, 64 * 10_000, {}),  # more than there are: all
        (0.3, 64 * 12, {"void": 0.9}),  # few valid pixels
        (0.2, 64 * 30, {"h": 65, "w": 97, "k": 19}),
        (0.2, 64 * 15, {"h": 64, "w": 96, "sharpness": 0.5}),
        (0.2, 64, {"h": 9, "w": 7}),  # shrinks to one pixel each
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ohem_matches_the_recipe_on_the_host(thresh, min_kept, case, seed):
    preds, target = random_case(seed=seed, **case)
    weight = class_weight(case.get("k", 5)) if seed == 2 else None  # one of the seeds is enough
    criterion = CriterionOhemDSN(thresh, min_kept, weight=weight)
    logits = upsample(preds[0], target.shape[1:]).detach()
    probability = logits.softmax(1).numpy()
    threshold = ohem_threshold_on_the_host(probability, target.numpy(), thresh, min_kept)
    assert criterion.threshold(logits, target.long()).item() == pytest.approx(threshold, abs=1e-6)

    true_class = np.take_along_axis(probability, np.where(target == 255, 0, target).astype(int)[:, None], 1)[:, 0]
    hard = torch.from_numpy((true_class <= threshold) & (target.numpy() != 255))
    kept = torch.where(hard, target.long(), 255)
    expected = 0.4 * plain(preds[1], target, weight)
    if hard.any():
        expected = expected + plain(preds[0], kept, weight)
    loss = criterion(preds, target)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, preds, allow_unused=True) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_ohem_with_exactly_k_valid_pixels_keeps_all():
    preds, target = random_case(n=1, h=16, w=16)
    target[:] = 255
    target[0, ::15, ::15] = 1  # the four corners are the four pixels of the shrunk map
    assert CriterionOhemDSN(0.1, 64 * 4).threshold(upsample(preds[0], (16, 16)), target.long()).item() == 1


def sharded_worker(rank):
    """Its part of a batch of 3 images, against the whole batch in one process."""
    part = BatchShard(shard(3, rank, 2), 3)
    for make, seed in ((CriterionDSN, 0), (CriterionDSN, 1), (lambda *a: CriterionOhemDSN(0.2, 64 * 30, *a), 1)):
        for void in (0.1, 1.1):
            preds, target = random_case(n=3, seed=seed, void=void)
            target[0][target[0] == 3] = 255  # absent from the first process
            weight = class_weight()
            images = slice(part.images.start, part.images.stop)
            mine = [pred.detach()[images].requires_grad_() for pred in preds]
            loss = make(255, part, weight)(mine, target[images])
            expected = make(255, None, weight)(preds, target)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, expected.detach())
            gradients = torch.autograd.grad(loss, mine)
            for gradient, whole in zip(gradients, torch.autograd.grad(expected, preds), strict=True):
                torch.testing.assert_close(gradient / 2, whole[images])


@pytest.mark.slow
def test_weighted_losses_of_2_processes_are_those_of_one(tmp_path):
    distributed_processes(sharded_worker, tmp_path, 2)  # an error if one of them fails


@pytest.mark.parametrize(
    "criterion", [CriterionDSN(), CriterionOhemDSN(0.7, 640), CriterionOhemDSN(0.7, 640, weight=class_weight())]
)
def test_nothing_waits_for_the_device(criterion, no_host_copies):
    preds, target = random_case()
    with no_host_copies:
        criterion(preds, target).backward()
    # On the meta device there are no values: whatever needs one, or another device, fails.
    criterion.to("meta")([pred.detach().to("meta") for pred in preds], target.to("meta"))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="thresh: expected a probability"):
        CriterionOhemDSN(1.5)
    with pytest.raises(ValueError, match="min_kept: expected 0 or more"):
        CriterionOhemDSN(0.5, -1)
