"""ContextNet: Poudel et al., "ContextNet: Exploring Context and Detail for Semantic Segmentation in
Real-time", 2018, cn14: the deep branch sees a quarter of the resolution (section 3, Tables 1 and 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from peers.layers import conv_bn, resize


class Bottleneck(nn.Module):
    """Inverted residual: expand, depth-wise, linear projection."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1) -> None:
        super().__init__()
        inner = inputs * expansion
        self.body = nn.Sequential(conv_bn(inputs, inner, 1), conv_bn(inner, inner, 3, stride, groups=inner),
                                  conv_bn(inner, outputs, 1, act=False))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def separable(inputs: int, outputs: int, stride: int = 1, *, dilation: int = 1) -> nn.Sequential:
    """Depth-wise 3x3, point-wise."""
    return nn.Sequential(conv_bn(inputs, inputs, 3, stride, dilation=dilation, groups=inputs),
                         conv_bn(inputs, outputs, 1))


class ContextNet(nn.Module):
    """A deep branch at low and a shallow one at full resolution, fused at an eighth."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        # (output channels, expansion, stride of the first, blocks)
        rows = ((32, 1, 1, 1), (32, 6, 1, 1), (48, 6, 2, 3), (64, 6, 2, 3), (96, 6, 1, 2), (128, 6, 1, 2))
        deep: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
        inputs = 32
        for outputs, expansion, stride, blocks in rows:
            for i in range(blocks):
                deep.append(Bottleneck(inputs, outputs, expansion, stride if i == 0 else 1))
                inputs = outputs
        self.deep = nn.Sequential(*deep)
        self.shallow = nn.Sequential(conv_bn(3, 32, 3, 2), separable(32, 64, 2), separable(64, 128, 2),
                                     separable(128, 128))
        self.deep_fuse = nn.Sequential(conv_bn(128, 128, dilation=4, groups=128),
                                       conv_bn(128, 128, 1, act=False))
        self.shallow_fuse = conv_bn(128, 128, 1, act=False)
        self.head = nn.Sequential(separable(128, 128), separable(128, 128), nn.Conv2d(128, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        small = F.interpolate(x, size=[max(side // 4, 1) for side in x.shape[-2:]], mode="bilinear",
                              align_corners=False)
        shallow = self.shallow(x)
        deep = resize(self.deep(small), shallow.shape)
        fused = F.relu(self.deep_fuse(deep) + self.shallow_fuse(shallow))
        return resize(self.head(fused), x.shape)
