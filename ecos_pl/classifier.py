"""What is trained and delivered: a timm network with its pixel statistics and class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecos_pl.backbone import create_backbone, pixel_statistics


class Classifier(nn.Module):
    """Images in, class scores out; the same arithmetic in training, test and at the client.

    Args:
        net: timm network with K outputs.
        backbone: Its timm architecture, which says how pixels are normalised.
        image_size: Input side S in pixels.
        classes: Names of the K classes.
    """

    def __init__(
        self, net: nn.Module, backbone: str, image_size: int, classes: Sequence[str]
    ) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.backbone, self.image_size, self.classes = backbone, image_size, list(classes)
        mean, std = pixel_statistics(backbone)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def create(
        cls,
        classes: Sequence[str],
        *,
        backbone: str,
        weights: str = "auto",
        image_size: int,
        seed: int = 0,
    ) -> Classifier:
        """Make a network with a fresh head that begins at zero.

        As in BiT (Kolesnikov et al. 2020): every class is equally likely at first, and pretrained
        features are not shaken by a random head's gradients. With noisy labels and few steps that
        matters more than anything else.

        Args:
            classes: Names of the K classes.
            backbone: timm architecture.
            weights: See ``backbone.create_backbone``.
            image_size: Input side in pixels.
            seed: Of what is initialised at random.

        Raises:
            WeightsError: See ``backbone.create_backbone``.
        """
        net = create_backbone(
            backbone, weights, image_size=image_size, num_classes=len(classes), seed=seed
        )
        head = net.get_classifier()  # type: ignore[operator]  # every timm model has it
        if isinstance(head, nn.Linear):
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        return cls(net, backbone, image_size, classes)

    def freeze_backbone(self) -> None:
        """Leave only the head to train: the features stay what they are.

        Raises:
            ValueError: The network has no linear layer for a head.
        """
        head = self.net.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{self.backbone} has no linear head to train alone")
        self.net.requires_grad_(False)
        head.requires_grad_(True)

    def normalise(self, images: Tensor) -> Tensor:
        """What the network sees of images [B, 3, S, S] uint8."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        pixels = (images.to(mean.dtype) - mean) / std
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        logits: Tensor = self.net(self.normalise(images))
        return logits

    @property
    def num_features(self) -> int:
        """Dimensions of what the head sees."""
        return int(self.net.head_hidden_size)  # type: ignore[arg-type]  # every timm model has it

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [B, K] of images [B, 3, S, S] uint8, and what the head saw [B, D]."""
        net: Any = self.net
        features = net.forward_head(net.forward_features(self.normalise(images)), pre_logits=True)
        return net.get_classifier()(features), features
