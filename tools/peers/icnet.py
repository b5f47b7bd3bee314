"""ICNet: Zhao et al., "ICNet for Real-Time Semantic Segmentation on High-Resolution Images", 2018: a PSPNet
of ResNet-50 with half of its kernels on a quarter of the resolution, its first half shared with the branch
on half of it, three convolutions on the full image, and cascade feature fusion (section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from peers.layers import conv_bn, resize


class Bottleneck(nn.Module):
    """ResNet's: reduce, 3x3, expand."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(inputs, inner, 1, stride), conv_bn(inner, inner, dilation=dilation),
                                  conv_bn(inner, outputs, 1, act=False))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def stage(inputs: int, inner: int, outputs: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    rest = (Bottleneck(outputs, inner, outputs, 1, dilation) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, inner, outputs, stride, dilation), *rest)


class Fusion(nn.Module):
    """Cascade feature fusion: the lower branch upsampled and convolved, the higher one projected, added."""

    def __init__(self, low: int, high: int, outputs: int) -> None:
        super().__init__()
        self.low = conv_bn(low, outputs, dilation=2, act=False)
        self.high = conv_bn(high, outputs, 1, act=False)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        size = [2 * side for side in low.shape[-2:]]
        high = self.high(high)
        return F.relu(resize(self.low(resize(low, size)), high.shape) + high)


class ICNet(nn.Module):
    """Three branches on 1, 1/2 and 1/4 of the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.high = nn.Sequential(conv_bn(3, 32, 3, 2), conv_bn(32, 32, 3, 2), conv_bn(32, 64, 3, 2))
        self.stem = nn.Sequential(conv_bn(3, 32, 3, 2), conv_bn(32, 32), conv_bn(32, 64),
                                  nn.MaxPool2d(3, 2, 1))
        self.stage2 = stage(64, 32, 128, 3, 1, 1)
        self.stage3 = stage(128, 64, 256, 4, 2, 1)
        self.stage4 = stage(256, 128, 512, 6, 1, 2)
        self.stage5 = stage(512, 256, 1024, 3, 1, 4)
        self.reduce = conv_bn(1024, 256, 1)
        self.fuse_low, self.fuse_high = Fusion(256, 256, 128), Fusion(128, 64, 128)
        self.classifier = nn.Conv2d(128, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        # The shared first half; its output is halved again for the branch on a quarter.
        medium = self.stage3(self.stage2(self.stem(half)))
        low = F.interpolate(medium, scale_factor=0.5, mode="bilinear", align_corners=False)
        low = self.stage5(self.stage4(low))
        pyramid = low
        for bins in (1, 2, 3, 6):
            pyramid = pyramid + resize(F.adaptive_avg_pool2d(low, bins), low.shape)
        fused = self.fuse_high(self.fuse_low(self.reduce(pyramid), medium), self.high(x))
        quarter = resize(fused, [2 * side for side in fused.shape[-2:]])
        return resize(self.classifier(quarter), x.shape)
