"""ENet: Paszke et al., "ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation",
2016, Table 1 and section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.layers import BNPReLU, conv_bn, conv_bn_prelu, resize


class Initial(nn.Module):
    """13 channels of a strided convolution beside the max-pooled image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 13, 3, 2, 1, bias=False)
        self.after = BNPReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([self.conv(x), F.max_pool2d(x, 2, ceil_mode=True)], 1))


class Bottleneck(nn.Module):
    """Projection to a quarter, a main convolution (regular, dilated or 5x1 after 1x5), expansion."""

    def __init__(self, channels: int, *, dilation: int = 1, asymmetric: bool = False) -> None:
        super().__init__()
        inner = channels // 4
        if asymmetric:
            main = nn.Sequential(
                nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False),
                nn.Conv2d(inner, inner, (1, 5), padding=(0, 2), bias=False),
                BNPReLU(inner),
            )
        else:
            main = conv_bn_prelu(inner, inner, dilation=dilation)
        self.body = nn.Sequential(conv_bn_prelu(channels, inner, 1), main,
                                  conv_bn(inner, channels, 1, act=False))
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


class Down(nn.Module):
    """Strided bottleneck beside a max pooling, whose indices the decoder takes; padded with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = inputs // 4
        self.body = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inputs, inner, 2, 2, bias=False), BNPReLU(inner),
            conv_bn_prelu(inner, inner), conv_bn(inner, outputs, 1, act=False),
        )
        self.act = nn.PReLU(outputs)
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        body = self.body(x)[:, :, : pooled.shape[2], : pooled.shape[3]]
        return self.act(body + F.pad(pooled, (0, 0, 0, 0, 0, self.more))), indices


class Up(nn.Module):
    """Bottleneck with a transposed convolution, beside max unpooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = inputs // 4
        self.before = conv_bn_prelu(inputs, inner, 1)
        self.main = nn.ConvTranspose2d(inner, inner, 3, 2, 1, bias=False)
        self.after = nn.Sequential(BNPReLU(inner), conv_bn(inner, outputs, 1, act=False))
        self.skip = conv_bn(inputs, outputs, 1, act=False)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, indices: Tensor, size: torch.Size) -> Tensor:
        shape = list(size[-2:])
        unpooled = F.max_unpool2d(self.skip(x), indices, 2, output_size=shape)
        return self.act(self.after(self.main(self.before(x), output_size=shape)) + unpooled)


class ENet(nn.Module):
    """Encoder of five stages to an eighth, small decoder."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.initial = Initial()
        self.down1, self.stage1 = Down(16, 64), nn.Sequential(*(Bottleneck(64) for _ in range(4)))
        self.down2 = Down(64, 128)

        def stage() -> list[Bottleneck]:
            blocks = []
            for dilation in (2, 8):
                blocks += [Bottleneck(128), Bottleneck(128, dilation=dilation),
                           Bottleneck(128, asymmetric=True), Bottleneck(128, dilation=2 * dilation)]
            return blocks

        self.stages = nn.Sequential(*stage(), *stage())
        self.up4, self.stage4 = Up(128, 64), nn.Sequential(Bottleneck(64), Bottleneck(64))
        self.up5, self.stage5 = Up(64, 16), Bottleneck(16)
        self.full = nn.ConvTranspose2d(16, classes, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half = self.initial(x)
        quarter, indices1 = self.down1(half)
        quarter = self.stage1(quarter)
        eighth, indices2 = self.down2(quarter)
        eighth = self.stages(eighth)
        quarter = self.stage4(self.up4(eighth, indices2, quarter.shape))
        out = self.full(self.stage5(self.up5(quarter, indices1, half.shape)))
        return out if out.shape[-2:] == x.shape[-2:] else resize(out, x.shape)
