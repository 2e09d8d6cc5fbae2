"""Which epochs' weights ``last.ckpt`` and ``best.ckpt`` keep."""

import math

import lightning.pytorch as pl
import pytest
import torch

from resnet_reg_ext.recipe.callbacks import Checkpoints
from resnet_reg_ext.recipe.train import be_quiet

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


class Given(pl.LightningModule):
    """Has the validation losses that it is given, one an epoch; its state tells the epoch."""

    def __init__(self, losses):
        super().__init__()
        self.given = losses
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("epoch", torch.tensor(0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 1))

    val_dataloader = train_dataloader

    def training_step(self, batch, _):
        self.epoch.fill_(self.current_epoch + 1)
        return (batch * self.weight).sum()

    def validation_step(self, batch, _):
        self.log("validation_loss", self.given[self.current_epoch])


def kept(folder, losses, *, resume=False, every=1):
    """Goes through as many epochs as there are losses; returns the epochs of the checkpoints."""
    be_quiet()
    trainer = pl.Trainer(
        max_epochs=len(losses),
        check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
        accelerator="cpu",
        callbacks=[Checkpoints(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = folder / "last.ckpt" if resume else None
    trainer.fit(Given(losses), ckpt_path=start, weights_only=True)
    return {
        path.stem: torch.load(path, weights_only=True)["state_dict"]["epoch"].item()
        for path in folder.glob("*.ckpt")
    }


def test_checkpoints_keep_the_last_epoch_and_that_of_the_lowest_loss(tmp_path):
    assert kept(tmp_path, [3.0, 1.0, 2.0]) == {"best": 2, "last": 3}
    assert "optimizer_states" not in torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert "optimizer_states" in torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_checkpoints_know_the_lowest_loss_after_a_resumption(tmp_path):
    assert kept(tmp_path, [3.0, 1.0]) == {"best": 2, "last": 2}
    # Higher than before the resumption, then lower than that but not lowest, then lowest.
    assert kept(tmp_path, [3.0, 1.0, 2.5, 1.5], resume=True) == {"best": 2, "last": 4}
    assert kept(tmp_path, [3.0, 1.0, 2.5, 1.5, 0.5], resume=True) == {"best": 5, "last": 5}


def test_checkpoints_are_of_epochs_that_were_evaluated(tmp_path):
    # The losses of epochs 1 and 3 are never measured.
    assert kept(tmp_path, [0.0, 1.0, 0.0, 2.0, 3.0], every=2) == {"best": 2, "last": 4}


def test_any_loss_is_better_than_nan(tmp_path):
    assert kept(tmp_path, [math.nan, 3.0, math.nan, 2.0, 2.5]) == {"best": 4, "last": 5}
