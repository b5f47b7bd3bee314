"""What several of the networks are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, dilation: int = 1,
            groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution that keeps the size (or divides it by the stride), batch norm, ReLU."""
    padding = dilation * (kernel - 1) // 2
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


def conv_bn_prelu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, dilation: int = 1,
                  groups: int = 1) -> nn.Sequential:
    """The same with a PReLU of one slope per channel."""
    return nn.Sequential(
        *conv_bn(inputs, outputs, kernel, stride, dilation=dilation, groups=groups, act=False),
        nn.PReLU(outputs),
    )


class BNPReLU(nn.Sequential):
    """Batch norm and PReLU, for what was concatenated or added."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.PReLU(channels))


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres."""
    return F.interpolate(x, size=tuple(size[-2:]), mode="bilinear", align_corners=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., "Deep Residual Learning", 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, act=False))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))
