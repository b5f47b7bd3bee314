"""BiSeNet with a context path of ResNet-18's size: Yu et al., "BiSeNet: Bilateral Segmentation Network for
Real-time Semantic Segmentation", 2018, section 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peers.layers import BasicBlock, conv_bn, resize


class Refine(nn.Module):
    """Attention refinement: a convolution whose channels a global vector reweights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv_bn(inputs, outputs)
        self.gate = nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
                                  nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x.mean((2, 3), keepdim=True))


class Fuse(nn.Module):
    """Feature fusion: joined, convolved, reweighted, with a residual."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv_bn(inputs, outputs, 1)
        self.gate = nn.Sequential(nn.Conv2d(outputs, outputs // 4, 1, bias=False), nn.ReLU(inplace=True),
                                  nn.Conv2d(outputs // 4, outputs, 1, bias=False), nn.Sigmoid())

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        x = self.conv(torch.cat([spatial, context], 1))
        return x + x * self.gate(x.mean((2, 3), keepdim=True))


class BiSeNet(nn.Module):
    """Spatial path of three strided convolutions beside a deep context path."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(conv_bn(3, 64, 7, 2), conv_bn(64, 64, 3, 2), conv_bn(64, 64, 3, 2),
                                     conv_bn(64, 128, 1))
        self.stem = nn.Sequential(conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        widths = (64, 64, 128, 256, 512)
        self.stages = nn.ModuleList(
            nn.Sequential(BasicBlock(a, b, 1 if i == 0 else 2), BasicBlock(b, b))
            for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )
        self.refine16, self.refine32 = Refine(256, 128), Refine(512, 128)
        self.around = conv_bn(512, 128, 1)
        self.smooth16, self.smooth32 = conv_bn(128, 128), conv_bn(128, 128)
        self.fuse = Fuse(256, 256)
        self.head = nn.Sequential(conv_bn(256, 64), nn.Conv2d(64, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        spatial = self.spatial(x)
        features = [self.stem(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        sixteenth, thirty_second = features[3], features[4]
        around = self.around(thirty_second.mean((2, 3), keepdim=True))
        context = self.smooth32(resize(self.refine32(thirty_second) + around, sixteenth.shape))
        context = self.smooth16(resize(self.refine16(sixteenth) + context, spatial.shape))
        return resize(self.head(self.fuse(spatial, context)), x.shape)
