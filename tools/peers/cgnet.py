"""CGNet: Wu et al., "CGNet: A Light-weight Context Guided Network for Semantic Segmentation", 2018,
M = 3, N = 21 (Table 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.layers import BNPReLU, conv_bn_prelu, resize


class Gate(nn.Module):
    """Global context that reweights the channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = channels // reduction
        self.body = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(inplace=True),
                                  nn.Linear(inner, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x.mean((2, 3)))[:, :, None, None]


class ContextGuided(nn.Module):
    """Local and dilated depth-wise convolution side by side, joined, gated, with a residual."""

    def __init__(self, channels: int, dilation: int, reduction: int) -> None:
        super().__init__()
        width = channels // 2
        self.reduce = conv_bn_prelu(channels, width, 1)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.around = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, groups=width,
                                bias=False)
        self.after, self.gate = BNPReLU(channels), Gate(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        return x + self.gate(self.after(torch.cat([self.local(reduced), self.around(reduced)], 1)))


class ContextGuidedDown(nn.Module):
    """The strided form: no residual, channels doubled and then reduced."""

    def __init__(self, inputs: int, outputs: int, dilation: int, reduction: int) -> None:
        super().__init__()
        self.conv = conv_bn_prelu(inputs, outputs, 3, 2)
        self.local = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False)
        self.around = nn.Conv2d(outputs, outputs, 3, padding=dilation, dilation=dilation, groups=outputs,
                                bias=False)
        self.after, self.reduce = BNPReLU(2 * outputs), nn.Conv2d(2 * outputs, outputs, 1, bias=False)
        self.gate = Gate(outputs, reduction)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.gate(self.reduce(self.after(torch.cat([self.local(x), self.around(x)], 1))))


class CGNet(nn.Module):
    """Three stages to an eighth, the image fed in again at each, one bilinear upsampling."""

    def __init__(self, classes: int, blocks2: int = 3, blocks3: int = 21) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv_bn_prelu(3, 32, 3, 2), conv_bn_prelu(32, 32), conv_bn_prelu(32, 32))
        self.join1 = BNPReLU(32 + 3)
        self.down2 = ContextGuidedDown(35, 64, 2, 8)
        self.stage2 = nn.Sequential(*(ContextGuided(64, 2, 8) for _ in range(blocks2 - 1)))
        self.join2 = BNPReLU(128 + 3)
        self.down3 = ContextGuidedDown(131, 128, 4, 16)
        self.stage3 = nn.Sequential(*(ContextGuided(128, 4, 16) for _ in range(blocks3 - 1)))
        self.join3 = BNPReLU(256)
        self.classifier = nn.Conv2d(256, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half_image = F.avg_pool2d(x, 3, 2, 1)
        quarter_image = F.avg_pool2d(half_image, 3, 2, 1)
        one = self.join1(torch.cat([self.stage1(x), half_image], 1))
        down = self.down2(one)
        two = self.join2(torch.cat([self.stage2(down), down, quarter_image], 1))
        down = self.down3(two)
        three = self.join3(torch.cat([down, self.stage3(down)], 1))
        return resize(self.classifier(three), x.shape)
