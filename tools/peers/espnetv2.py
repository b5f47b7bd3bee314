"""ESPNetv2 for segmentation: Mehta et al., "ESPNetv2: A Light-weight, Power Efficient, and General
Purpose Convolutional Neural Network", 2019, sections 3 and 4.3, scale 1: EESP encoder to 1/16, and a
decoder that resizes and joins level by level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.layers import BNPReLU, conv_bn_prelu, resize

BRANCHES = 4


class EESP(nn.Module):
    """Grouped point-wise reduction, depth-wise dilated branches, fusion by addition, grouped expansion."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, receptive_field: int = 13) -> None:
        super().__init__()
        width = outputs // BRANCHES
        self.reduce = conv_bn_prelu(inputs, width, 1, groups=BRANCHES)
        # Kernels of side 2 d + 1 that see no more than the level's receptive field.
        sides = [min(3 + 2 * i, receptive_field) for i in range(BRANCHES)]
        dilations = sorted((side - 1) // 2 for side in sides)
        self.branches = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, d, d, groups=width, bias=False) for d in dilations
        )
        self.fuse = BNPReLU(outputs)
        self.expand = nn.Sequential(nn.Conv2d(outputs, outputs, 1, groups=BRANCHES, bias=False),
                                    nn.BatchNorm2d(outputs))
        self.act = nn.PReLU(outputs)
        self.residual = stride == 1 and inputs == outputs
        self.strided = stride == 2

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        outputs = [self.branches[0](reduced)]
        for branch in self.branches[1:]:
            outputs.append(outputs[-1] + branch(reduced))
        out = self.expand(self.fuse(torch.cat(outputs, 1)))
        if self.strided:
            return out  # activated after it has been joined
        return self.act(x + out if self.residual else out)


class Down(nn.Module):
    """Strided EESP beside an average pooling, and the image at that size."""

    def __init__(self, inputs: int, outputs: int, receptive_field: int) -> None:
        super().__init__()
        self.eesp = EESP(inputs, outputs - inputs, 2, receptive_field=receptive_field)
        self.image = nn.Sequential(conv_bn_prelu(3, 3), nn.Conv2d(3, outputs, 1, bias=False),
                                   nn.BatchNorm2d(outputs))
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        out = torch.cat([F.avg_pool2d(x, 3, 2, 1), self.eesp(x)], 1)
        return self.act(out + self.image(F.adaptive_avg_pool2d(image, out.shape[-2:])))


class Pyramid(nn.Module):
    """Depth-wise convolutions at four scales, joined."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        width = channels // 4
        self.reduce = conv_bn_prelu(channels, width, 1)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
                                    for _ in range(4))
        self.after = BNPReLU(4 * width)
        self.join = nn.Conv2d(4 * width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        outputs = []
        for scale, stage in enumerate(self.stages):
            small = x if scale == 0 else F.avg_pool2d(x, 2**scale, ceil_mode=True)
            outputs.append(resize(stage(small), x.shape))
        return self.join(self.after(torch.cat(outputs, 1)))


class ESPNetV2(nn.Module):
    """Encoder of four levels, decoder of three."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.level1 = conv_bn_prelu(3, 32, 3, 2)
        self.down2 = Down(32, 64, 13)
        self.down3 = Down(64, 128, 11)
        self.level3 = nn.Sequential(*(EESP(128, 128, receptive_field=11) for _ in range(3)))
        self.down4 = Down(128, 256, 9)
        self.level4 = nn.Sequential(*(EESP(256, 256, receptive_field=9) for _ in range(7)))
        self.pyramid = Pyramid(256, 4 * classes)
        self.join3 = nn.Sequential(BNPReLU(4 * classes + 128),
                                   conv_bn_prelu(4 * classes + 128, classes, 1))
        self.join2 = nn.Sequential(BNPReLU(classes + 64), conv_bn_prelu(classes + 64, classes, 1))
        self.join1 = nn.Conv2d(classes + 32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.level1(x)
        two = self.down2(one, x)
        three = self.level3(self.down3(two, x))
        four = self.level4(self.down4(three, x))
        out = self.pyramid(four)
        for level, join in ((three, self.join3), (two, self.join2), (one, self.join1)):
            out = join(torch.cat([resize(out, level.shape), level], 1))
        return resize(out, x.shape)
