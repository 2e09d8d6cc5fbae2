"""One training run of a ResNet-50 with ProxSGD: the example to copy."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import ProxSGD, Sparsity, param_groups, sparsity
from .data import CLASSES, Digits


@dataclass(frozen=True)
class Settings:
    """What a run is made with, data apart."""

    l1: float = 0.0
    weight_decay: float = 0.0
    lr: float = 0.05
    momentum: float = 0.9
    epochs: int = 12
    batch_size: int = 20
    evaluate_every: int = 4
    """Epochs between evaluations, which take time too; the last epoch is always evaluated."""
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """Where a run stood after an epoch, measured in evaluation mode."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    zeros: float
    """Share of exact zeros in the weights that are regularised, or would be."""


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    settings: Settings
    history: list[Epoch]
    zeros_by_layer: dict[str, float]
    """Share of exact zeros by parameter name, regularised weights only, input to output."""
    optimizer_ms: float
    """Median time of ``optimizer.step()``."""
    step_ms: float
    """Median time of a whole training step: forward, backward and optimizer."""
    seconds: float
    model: nn.Module = field(repr=False)

    @property
    def last(self) -> Epoch:
        """The state at the end."""
        return self.history[-1]

    @property
    def gap(self) -> float:
        """Training accuracy minus test accuracy: how much is overfitting."""
        return self.last.train_accuracy - self.last.test_accuracy


def train(
    name: str, data: Digits, settings: Settings, *, device: str = "cpu", progress: bool = True
) -> Result:
    """Trains torchvision's ResNet-50 from scratch.

    The seed decides the initial weights and the order of the images. On a CPU the same seed and
    number of threads give the same weights, bit by bit.

    Args:
        name: stands before the progress bar.
        data: see :func:`resnet_reg_ext.recipe.data.load_digits`.
        settings: hyperparameters, epochs and the seed.
        device: where to train.
        progress: whether to show a bar with loss, accuracy, zeros and the time left.
    """
    from torchvision.models import resnet50
    from tqdm import tqdm

    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    # Residual branches that start at zero: from scratch it learns in tens of steps, not hundreds.
    model = resnet50(num_classes=CLASSES, zero_init_residual=True)
    model = model.to(device, memory_format=torch.channels_last)
    # Norms and biases are in a group of their own that is not regularised.
    groups = param_groups(model, l1=settings.l1, weight_decay=settings.weight_decay)
    optimizer = ProxSGD(groups, lr=settings.lr, momentum=settings.momentum)

    images, labels = data.train_images.to(device), data.train_labels.to(device)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)
    # A last batch that is not full is left out: batch norm does badly on a few images.
    batches = max(1, len(labels) // settings.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)

    history: list[Epoch] = []
    optimizer_times: list[float] = []
    step_times: list[float] = []
    with tqdm(total=settings.epochs * batches, desc=name, unit="step", disable=not progress) as bar:
        for epoch in range(1, settings.epochs + 1):
            model.train()
            seen, hits, loss_sum = 0, 0, 0.0
            zeros = _regularised(optimizer)
            order = torch.randperm(len(labels))[: batches * settings.batch_size]
            for rows in order.to(device).chunk(batches):
                start = _now(device)
                optimizer.zero_grad()
                logits = model(images[rows])
                loss = cross_entropy(logits, labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                middle = _now(device)
                optimizer.step()
                end = _now(device)
                scheduler.step()
                optimizer_times.append(end - middle)
                step_times.append(end - start)

                # The bar shows this epoch so far, as seen in training mode.
                seen += len(rows)
                hits += int((logits.argmax(1) == labels[rows]).sum())
                loss_sum += loss.item() * len(rows)
                bar.set_postfix_str(
                    f"loss {loss_sum / seen:.3f}, accuracy {hits / seen:.2f}, "
                    f"zeros {zeros.fraction:.0%}",
                    refresh=False,
                )
                bar.update()
            if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
                train_scores = evaluate(model, images, labels)
                test_scores = evaluate(model, test_images, test_labels)
                zeros = _regularised(optimizer)
                history.append(Epoch(epoch, *train_scores, *test_scores, zeros.fraction))
    return Result(
        settings,
        history,
        {layer.name: layer.fraction for layer in zeros.layers},
        1000 * median(optimizer_times),
        1000 * median(step_times),
        time.perf_counter() - started,
        model,
    )


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode."""
    model.eval()
    logits = torch.cat([model(chunk) for chunk in torch.split(images, 250)])
    loss = cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).float().mean().item()


def _regularised(optimizer: ProxSGD) -> Sparsity:
    """Zeros of the first group: ``sparsity(optimizer).regularised``, but where l1 is 0 too."""
    return Sparsity(sparsity(optimizer).layers[: len(optimizer.param_groups[0]["params"])])


def _now(device: str) -> float:
    """The time once the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
