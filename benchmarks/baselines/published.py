"""How the published student systems train, written anew from their description.

`ImageFolder` over JPEG files, a `DataLoader` with processes, Pillow's transforms image by image,
float32 in NCHW, torch's optimizers as they come, and the loss and the number of right answers read
at every step. Their mistakes are kept: that is what is compared with. Knows nothing of Skipline's
engine.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.baselines.problem import Problem, Turn, set_backends, timed, torch_optimizer

NUM_WORKERS = 8
"""Loader processes of the description."""
VGG = "vgg10_64px"
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))
VGG_HEAD = (512, 1028, 1028, 512)


class PublishedVgg(nn.Module):
    """float [B, 3, 64, 64] -> logits [B, num_classes] and the last map [B, 512, 4, 4].

    Its average pool of 3 drops a row and a column of that map.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in VGG_STAGES:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        head: list[nn.Module] = []
        for width, next_width in pairwise(VGG_HEAD):
            head += [nn.Linear(width, next_width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AvgPool2d(3)
        self.head = nn.Sequential(*head, nn.Linear(VGG_HEAD[-1], num_classes))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(x)
        return self.head(self.pool(features).flatten(1)), features


def network(problem: Problem) -> nn.Module:
    """The system's own network, with the weights that ours starts from."""
    ours = problem.new_model()
    if problem.spec.model.arch != VGG:
        return ours
    theirs = PublishedVgg(problem.num_classes, problem.spec.model.dropout)
    with torch.no_grad():
        for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert target.shape == source.shape, "the networks are not the same"
            target.copy_(source)
    return theirs


def loader(problem: Problem, split: str) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled for training, with the spec's crop and flip; the ragged last batch included."""
    size, is_train = problem.preprocessing.image_size, split == "train"
    steps: list[object] = []
    if is_train and "random_crop" in problem.augmentations:
        steps.append(transforms.RandomCrop(size, padding=size // 8))
    if is_train and "horizontal_flip" in problem.augmentations:
        steps.append(transforms.RandomHorizontalFlip())
    mean, std = problem.preprocessing.channel_mean, problem.preprocessing.channel_std
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    images = ImageFolder(str(problem.folder / split), transforms.Compose(steps))
    return DataLoader(
        images,
        batch_size=problem.spec.batch_size,
        shuffle=is_train,
        num_workers=problem.num_workers,
    )


def train_epoch(
    problem: Problem,
    model: nn.Module,
    batches: DataLoader[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Returns how many images there were."""
    criterion = nn.CrossEntropyLoss()
    num_images, num_right, running_loss = 0, 0, 0.0
    for x, targets in batches:
        x, targets = x.to(problem.device), targets.to(problem.device)
        optimizer.zero_grad()
        logits = _logits(model(x))
        loss = criterion(logits, targets)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        num_right += int(logits.argmax(dim=1).eq(targets).sum().item())
        num_images += len(targets)
    return num_images


def run(problem: Problem) -> Turn:
    """An epoch, its loader's processes included."""
    set_backends(tf32=True, benchmark=False)
    torch.manual_seed(problem.spec.seed)
    model = network(problem).to(problem.device).train()
    optimizer, batches = torch_optimizer(problem.spec, model), loader(problem, "train")
    return timed(problem, lambda: train_epoch(problem, model, batches, optimizer))


def val_top1(problem: Problem) -> float:
    """Trains for `num_epochs` and measures on `val` as they do: in training mode, so that dropout
    is active."""
    set_backends(tf32=True, benchmark=False)
    torch.manual_seed(problem.spec.seed)
    model = network(problem).to(problem.device).train()
    optimizer, batches = torch_optimizer(problem.spec, model), loader(problem, "train")
    for _ in range(problem.num_epochs):
        train_epoch(problem, model, batches, optimizer)
    num_images, num_right = 0, 0
    with torch.no_grad():
        for x, targets in loader(problem, "val"):
            answers = _logits(model(x.to(problem.device))).argmax(dim=1)
            num_right += int(answers.eq(targets.to(problem.device)).sum().item())
            num_images += len(targets)
    return num_right / num_images


def _logits(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
