"""Other people's training loops and metrics with this project's networks, each as their documentation uses them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset import CITYSCAPES, EvaluationSet, TrainingSet, scan
from networks import build_model
from utils.criterion import CriterionDSN
from utils.metrics import ConfusionMatrix

pytestmark = pytest.mark.slow


def batches(scenes, count: int) -> DataLoader:
    samples = TrainingSet(scan(scenes, "train"), (33, 41), random_scale=False)
    return DataLoader(samples, batch_size=2, sampler=range(2 * count))


def trained_plainly(model: nn.Module, loader: DataLoader) -> nn.Module:
    """A copy of the model after a step of SGD for each batch."""
    model = copy.deepcopy(model)
    optimizer, criterion = torch.optim.SGD(model.parameters(), 1e-2, 0.9), CriterionDSN()
    for batch in loader:
        optimizer.zero_grad()
        criterion(model(batch["image"]), batch["label"]).backward()
        optimizer.step()
    return model


def small() -> nn.Module:
    """Without dropout, so that nothing is drawn at random."""
    torch.manual_seed(0)
    model = build_model("resnet18")
    nn.init.constant_(model.head.gamma, 0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0
    return model


def assert_equal(actual: nn.Module, expected: nn.Module) -> None:
    before = small().state_dict()
    moved = 0
    for (name, a), b in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        moved += not torch.equal(a, before[name])
    assert moved > 100


def test_lightning_trains(scenes, tmp_path):
    import pytorch_lightning as lightning

    class Segmentation(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = small(), CriterionDSN()

        def training_step(self, batch, index):
            return self.criterion(self.model(batch["image"]), batch["label"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2, 0.9)

    module = Segmentation()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches(scenes, 2))
    assert_equal(module.model, trained_plainly(small(), batches(scenes, 2)))


def test_accelerate_trains(scenes):
    from accelerate import Accelerator

    accelerator, model, criterion = Accelerator(cpu=True), small(), CriterionDSN()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, 0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(scenes, 2))
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(criterion(model(batch["image"]), batch["label"]))
        optimizer.step()
    assert_equal(accelerator.unwrap_model(model), trained_plainly(small(), batches(scenes, 2)))


def test_torchmetrics_measures_the_same(scenes):
    from torchmetrics.classification import MulticlassJaccardIndex

    theirs = MulticlassJaccardIndex(len(CITYSCAPES), average="none", ignore_index=255)
    ours = ConfusionMatrix(len(CITYSCAPES))
    generator = torch.Generator().manual_seed(0)
    for sample in EvaluationSet(scan(scenes, "val")):
        label = sample["label"].long()
        wrong = torch.rand(label.shape, generator=generator) < 0.3
        prediction = torch.where(wrong, torch.randint(13, label.shape, generator=generator), label.clamp(max=18))
        theirs.update(prediction[None], label[None])
        ours.update(label, prediction)
    present = ~ours.iou().isnan()
    torch.testing.assert_close(theirs.compute()[present].double(), ours.iou()[present], rtol=1e-6, atol=1e-6)
    assert 0.3 < ours.iou()[present].max() < 0.95
