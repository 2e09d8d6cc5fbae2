"""A run that several processes share."""

import subprocess
import sys

import torch
from test_recipe import ALONE, tensors

from resnet_reg_ext.recipe.results import Result

RANKS = """
import sys
from pathlib import Path
import torch
from lightning.pytorch.callbacks import Callback
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train

class Keep(Callback):
    def on_train_end(self, trainer, module):
        assert trainer.world_size == 2
        optimizer = trainer.optimizers[0].state_dict()
        state = {"model": module.model.state_dict(), "optimizer": optimizer}
        torch.save(state, out.parent / f"rank{trainer.global_rank}.pt")

if __name__ == "__main__":
    out = Path(sys.argv[1])
    train(Run(train_size=30, test_size=21, batch_size=10, image_size=16, epochs=1, l1=1e-2,
              devices=2, strategy="ddp", accelerator="cpu"), out, callbacks=[Keep()])
"""


def test_two_processes_end_with_the_same_bits(tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "out"]
    subprocess.run(command, env=ALONE, check=True, capture_output=True, timeout=300)
    first, second = (tensors(torch.load(tmp_path / f"rank{r}.pt")) for r in (0, 1))
    assert len(first) > 400
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Each test image was measured once, in one of the two.
    assert sum(map(sum, Result.load(tmp_path / "out").confusion)) == 21
