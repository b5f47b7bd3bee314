"""ESPNet: Mehta et al., "ESPNet: Efficient Spatial Pyramid of Dilated Convolutions for Semantic
Segmentation", 2018, Fig. 4 (d), alpha_2 = 2, alpha_3 = 8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.layers import BNPReLU, conv_bn_prelu, resize


class ESP(nn.Module):
    """Reduce, split into five dilated convolutions, add hierarchically, concatenate."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 5
        first = outputs - 4 * width
        self.reduce = nn.Conv2d(inputs, width, 3 if stride == 2 else 1, stride, int(stride == 2), bias=False)
        self.branches = nn.ModuleList(
            nn.Conv2d(width, first if i == 0 else width, 3, padding=2**i, dilation=2**i, bias=False)
            for i in range(5)
        )
        self.after = BNPReLU(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        outputs = [branch(reduced) for branch in self.branches]
        for i in range(2, 5):
            outputs[i] = outputs[i] + outputs[i - 1]
        out = torch.cat(outputs, 1)
        return self.after(x + out if self.residual else out)


class Up(nn.Module):
    """Transposed convolution to twice the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 2, 2, bias=False)
        self.after = BNPReLU(channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.after(self.conv(x)[:, :, : size[-2], : size[-1]])


class ESPNet(nn.Module):
    """Encoder with the image fed in again at each level; decoder of the three levels' classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.level1 = conv_bn_prelu(3, 16, 3, 2)
        self.join1 = BNPReLU(16 + 3)
        self.down2 = ESP(19, 64, 2)
        self.level2 = nn.Sequential(*(ESP(64, 64) for _ in range(2)))
        self.join2 = BNPReLU(128 + 3)
        self.down3 = ESP(131, 128, 2)
        self.level3 = nn.Sequential(*(ESP(128, 128) for _ in range(8)))
        self.join3 = BNPReLU(256)
        self.classes3 = nn.Conv2d(256, classes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(classes)
        self.up3, self.classes2 = Up(classes), nn.Conv2d(131, classes, 1, bias=False)
        self.combine2 = nn.Sequential(BNPReLU(2 * classes), ESP(2 * classes, classes))
        self.up2 = Up(classes)
        self.combine1 = conv_bn_prelu(classes + 19, classes)
        self.full = nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half_image = F.avg_pool2d(x, 3, 2, 1)
        quarter_image = F.avg_pool2d(half_image, 3, 2, 1)
        one = self.join1(torch.cat([self.level1(x), half_image], 1))
        down = self.down2(one)
        two = self.join2(torch.cat([self.level2(down), down, quarter_image], 1))
        down = self.down3(two)
        three = self.join3(torch.cat([down, self.level3(down)], 1))
        up = self.up3(self.bn3(self.classes3(three)), two.shape)
        up = self.combine2(torch.cat([self.classes2(two), up], 1))
        up = self.combine1(torch.cat([self.up2(up, one.shape), one], 1))
        return resize(self.full(up), x.shape) if x.shape[-1] % 2 or x.shape[-2] % 2 else self.full(up)
