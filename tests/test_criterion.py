"""The losses against PyTorch's cross-entropy and against the original's OHEM on the host."""

import numpy as np
import pytest
import torch
from gradients import assert_same_gradients
from scipy import ndimage
from torch.nn import functional as F

from utils.criterion import CriterionDSN, CriterionOhemDSN, upsample


def random_case(n=2, k=5, h=41, w=57, sharpness=3.0, void=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    main = sharpness * torch.randn(n, k, h // 8 + 1, w // 8 + 1, generator=generator, dtype=torch.float64)
    auxiliary = torch.randn(main.shape, generator=generator, dtype=torch.float64)
    target = torch.randint(k, (n, h, w), generator=generator)
    target[torch.rand(n, h, w, generator=generator) < void] = 255
    return [main.requires_grad_(), auxiliary.requires_grad_()], target.to(torch.uint8)


def plain(logits, target):
    return F.cross_entropy(upsample(logits, target.shape[1:]), target.long(), ignore_index=255)


def test_dsn_is_the_sum_of_cross_entropies():
    preds, target = random_case()
    loss = CriterionDSN(255)(preds, target)
    expected = plain(preds[0], target) + 0.4 * plain(preds[1], target)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(loss, expected, dict(zip(("main", "auxiliary"), preds, strict=True)))


@pytest.mark.parametrize("criterion", [CriterionDSN(), CriterionOhemDSN(0.7, 64)])
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
    criterion = CriterionOhemDSN(thresh, min_kept)
    logits = upsample(preds[0], target.shape[1:]).detach()
    probability = logits.softmax(1).numpy()
    threshold = ohem_threshold_on_the_host(probability, target.numpy(), thresh, min_kept)
    assert criterion.threshold(logits, target.long()).item() == pytest.approx(threshold, abs=1e-6)

    true_class = np.take_along_axis(probability, np.where(target == 255, 0, target).astype(int)[:, None], 1)[:, 0]
    hard = torch.from_numpy((true_class <= threshold) & (target.numpy() != 255))
    kept = torch.where(hard, target.long(), 255)
    expected = plain(preds[0], kept) + 0.4 * plain(preds[1], target)
    if not hard.any():
        expected = 0.4 * plain(preds[1], target)
    torch.testing.assert_close(criterion(preds, target), expected, rtol=1e-6, atol=1e-6)


def test_ohem_with_exactly_k_valid_pixels_keeps_all():
    preds, target = random_case(n=1, h=16, w=16)
    target[:] = 255
    target[0, ::15, ::15] = 1  # the four corners are the four pixels of the shrunk map
    assert CriterionOhemDSN(0.1, 64 * 4).threshold(upsample(preds[0], (16, 16)), target.long()).item() == 1


@pytest.mark.parametrize("criterion", [CriterionDSN(), CriterionOhemDSN(0.7, 640)])
def test_nothing_waits_for_the_device(criterion, no_host_copies):
    preds, target = random_case()
    with no_host_copies:
        criterion(preds, target).backward()
    # On the meta device there are no values: whatever needs one, or another device, fails.
    criterion([pred.detach().to("meta") for pred in preds], target.to("meta"))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="thresh: expected a probability"):
        CriterionOhemDSN(1.5)
    with pytest.raises(ValueError, match="min_kept: expected 0 or more"):
        CriterionOhemDSN(0.5, -1)
