#!/usr/bin/env python3
"""FPENet in PyTorch: the executable specification that the Rust engine is checked against.

M. Liu, H. Yin, "Feature Pyramid Encoding Network for Real-time Semantic Segmentation", BMVC 2019.
State-dict names are those of the model file, so weights pass between the two without a mapping.
Shapes below are N x C x H x W; encoder strides give ceil(size / 2).

    python tools/fpenet_torch.py --self-test
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FORMAT = "fpenet-1"
WIDTHS = (16, 32, 64)
EXPANSION = 4
BN_EPS = 1e-5
BN_MOMENTUM = 0.1

# (p, q) -> parameters of the default network with 19 classes (SPEC, "Totals that must come out").
PARAMETER_TOTALS = {
    (3, 5): 233_495,
    (3, 7): 305_943,
    (5, 7): 325_783,
    (3, 9): 378_391,
    (5, 9): 398_231,
    (3, 11): 450_839,
}


@dataclass(frozen=True)
class Config:
    """The network's switches; field names are the JSON keys of the model file."""

    classes: int = 19
    p: int = 3
    q: int = 9
    branches: int = 4
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    branch_addition: bool = True
    long_skip: bool = True
    decoder: str = "meu"
    attention: str = "relu"
    block_activation: str = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))
        for name in ("classes", "p", "q"):
            _require(getattr(self, name) >= 1, f"config.{name}", "at least 1", getattr(self, name))
        _require(self.classes <= 255, "config.classes", "at most 255 (255 is void)", self.classes)
        _require(self.branches in (1, 2, 4), "config.branches", "1, 2 or 4", self.branches)
        _require(
            len(self.dilations) >= self.branches and min(self.dilations) >= 1,
            "config.dilations", f"at least {self.branches} positive values", list(self.dilations),
        )
        for name, allowed in (
            ("decoder", ("meu", "ca", "bilinear")),
            ("attention", ("relu", "sigmoid")),
            ("block_activation", ("linear", "relu")),
        ):
            value = getattr(self, name)
            _require(value in allowed, f"config.{name}", " or ".join(allowed), repr(value))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Parses the model file's `config`; absent keys take their defaults."""
        values: dict[str, Any] = json.loads(text)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        _require(not unknown, "config", "only the keys of the SPEC", unknown)
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _require(condition: bool, what: str, expected: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{what}: expected {expected}, found {found}")


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and an optional ReLU: c_in -> c_out, size / stride."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *,
        stride: int = 1, dilation: int = 1, groups: int = 1, relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            c_in, c_out, kernel, stride=stride, padding=kernel // 2 * dilation,
            dilation=dilation, groups=groups, bias=False,
        )
        self.bn = nn.BatchNorm2d(c_out, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class FPEBlock(nn.Module):
    """Feature pyramid encoding block: N x c_in x H x W -> N x c_out x H/s x W/s.

    expand (1x1) -> dilated depthwise branches, each fed with the previous one's output -> project
    (1x1) -> residual. Branch addition and the residual need stride 1.
    """

    def __init__(
        self, c_in: int, c_out: int, *, expansion: int, stride: int,
        dilations: tuple[int, ...], branch_addition: bool, relu: bool,
    ) -> None:
        super().__init__()
        width = expansion * c_in
        self.branch_width = width // len(dilations)
        self.add_previous = branch_addition and stride == 1
        self.residual = c_in == c_out and stride == 1
        self.expand = ConvBN(c_in, width, 1)
        self.branches = nn.ModuleList(
            ConvBN(
                self.branch_width, self.branch_width, 3,
                stride=stride, dilation=dilation, groups=self.branch_width,
            )
            for dilation in dilations
        )
        self.project = ConvBN(width, c_out, 1, relu=False)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        subsets = self.expand(x).split(self.branch_width, dim=1)
        outputs: list[Tensor] = []
        for branch, subset in zip(self.branches, subsets, strict=True):
            if outputs and self.add_previous:
                subset = subset + outputs[-1]
            outputs.append(branch(subset))
        y = self.project(torch.cat(outputs, dim=1))
        return self.act(y + x if self.residual else y)


class Stage(nn.Sequential):
    """A run of FPE blocks; with the long skip it leaves concat(first unit, last block).

    The first unit is the first block, or `first` where the caller hands one in (stage 1: the stem).
    """

    def __init__(self, *blocks: FPEBlock, long_skip: bool) -> None:
        super().__init__(*blocks)
        self.long_skip = long_skip

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        y = x
        for block in self:
            y = block(y)
            first = y if first is None else first
        return torch.cat((first, y), dim=1) if self.long_skip else y


class MEU(nn.Module):
    """Mutual embedding upsample: high N x c_high x h x w, low N x c_low x H x W -> N x c_out x H x W.

    out = low' * channel_gate(mean over space of high') + upsample(high') * spatial_gate(mean over
    channels of low'); without `spatial` (decoder "ca") the second gate is left out.
    """

    def __init__(self, c_high: int, c_low: int, c_out: int, *, spatial: bool, attention: str) -> None:
        super().__init__()
        gate = nn.ReLU if attention == "relu" else nn.Sigmoid
        self.high = nn.Conv2d(c_high, c_out, 1)
        self.low = nn.Conv2d(c_low, c_out, 1)
        self.channel_attention = nn.Conv2d(c_out, c_out, 1)
        self.channel_gate = gate()
        self.spatial_attention = nn.Conv2d(1, 1, 1) if spatial else None
        self.spatial_gate = gate()

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        high, low = self.high(high), self.low(low)
        channel = self.channel_gate(self.channel_attention(F.adaptive_avg_pool2d(high, 1)))
        up = upsample(high, low.shape[-2:])
        if self.spatial_attention is not None:
            up = up * self.spatial_gate(self.spatial_attention(low.mean(dim=1, keepdim=True)))
        return low * channel + up


class FPENet(nn.Module):
    """Images N x 3 x H x W (normalised; H, W >= 16) -> logits N x classes x H x W."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.config = config
        w1, w2, w3 = WIDTHS
        skip = 2 if config.long_skip else 1

        def stage(c_in: int, c_out: int, count: int) -> Stage:
            return Stage(
                *(
                    FPEBlock(
                        c_in if i == 0 else c_out, c_out, expansion=EXPANSION,
                        stride=2 if i == 0 else 1, dilations=config.dilations[: config.branches],
                        branch_addition=config.branch_addition, relu=config.block_activation == "relu",
                    )
                    for i in range(count)
                ),
                long_skip=config.long_skip,
            )

        self.stem = ConvBN(3, w1, 3, stride=2)
        self.stage1 = Stage(
            FPEBlock(
                w1, w1, expansion=1, stride=1, dilations=(1,),
                branch_addition=False, relu=config.block_activation == "relu",
            ),
            long_skip=config.long_skip,
        )
        self.stage2 = stage(skip * w1, w2, config.p)
        self.stage3 = stage(skip * w2, w3, config.q)
        if config.decoder == "bilinear":
            self.decoder2 = self.decoder1 = None
            self.classifier = nn.Conv2d(skip * w3, config.classes, 1)
        else:
            kind = {"spatial": config.decoder == "meu", "attention": config.attention}
            self.decoder2 = MEU(skip * w3, skip * w2, w3, **kind)
            self.decoder1 = MEU(w3, skip * w1, w2, **kind)
            self.classifier = nn.Conv2d(w2, config.classes, 1)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """He-normal convolutions (fan out), BN 1 and 0, biases 0, attention biases 1 (gates open)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
                module.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    module.bias.fill_(1.0 if name.endswith("_attention") else 0.0)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def intermediates(self, x: Tensor) -> dict[str, Tensor]:
        """Every named tensor in order: stage1 (H/2), stage2 (H/4), stage3 (H/8), decoder2 (H/4) and
        decoder1 (H/2) where there is a decoder, logits (H). Stages are after the long skip."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < 16:
            raise ValueError(f"input: expected N x 3 x H x W with H, W >= 16, found {list(x.shape)}")
        named: dict[str, Tensor] = {}
        stem = self.stem(x)
        named["stage1"] = self.stage1(stem, first=stem)
        named["stage2"] = self.stage2(named["stage1"])
        y = named["stage3"] = self.stage3(named["stage2"])
        if self.decoder2 is not None and self.decoder1 is not None:
            y = named["decoder2"] = self.decoder2(y, named["stage2"])
            y = named["decoder1"] = self.decoder1(y, named["stage1"])
        named["logits"] = upsample(self.classifier(y), x.shape[-2:])
        return named

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediates(x)["logits"]


def upsample(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear with half-pixel centres: N x C x h x w -> N x C x H x W."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fold_batch_norm(model: FPENet) -> FPENet:
    """An inference copy in which every batch norm has become part of its convolution."""
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, ConvBN):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return folded.requires_grad_(False)


@dataclass(frozen=True)
class Labels:
    """What a model file says about its classes and its input's normalisation (RGB, 0..1 scale)."""

    classes: list[str]
    palette: list[list[int]]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def generic(cls, count: int) -> Labels:
        """Placeholder names with the bit-interleaved colours of Pascal VOC."""

        def colour(i: int) -> list[int]:
            return [sum((i >> (3 * bit + c) & 1) << (7 - bit) for bit in range(3)) for c in range(3)]

        return cls([f"class {i}" for i in range(count)], [colour(i) for i in range(count)])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics under their names in the model file."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }


def save_tensors(
    path: Path | str, named: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file of f32 tensors, whatever they are held in.

    Same contents, same bytes; the safetensors package writes its metadata in random order.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    payload = bytearray()
    for name, tensor in sorted(named.items()):
        data = tensor.detach().cpu().numpy().astype("<f4").tobytes()
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        payload += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + payload)


def save_model(path: Path | str, model: FPENet, labels: Labels | None = None) -> None:
    """Writes the model file of the SPEC."""
    labels = labels or Labels.generic(model.config.classes)
    for what, values in (("class names", labels.classes), ("palette", labels.palette)):
        _require(len(values) == model.config.classes, f"{path}: {what}",
                 f"{model.config.classes} entries", len(values))
    metadata = {key: json.dumps(value) for key, value in asdict(labels).items()}
    metadata |= {"config": model.config.to_json(), "format": FORMAT}
    save_tensors(path, tensors(model), metadata)


def load_model(path: Path | str) -> tuple[FPENet, Labels]:
    """Reads a model file; names, shapes and types must be exactly those its config asks for."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        missing = {"config", "classes", "palette", "mean", "std", "format"} - metadata.keys()
        _require(not missing, f"{path}: metadata", "all keys of the SPEC", f"none of {sorted(missing)}")
        _require(metadata["format"] == FORMAT, f"{path}: format", FORMAT, metadata["format"])
        found = {name: file.get_tensor(name) for name in file.keys()}
    model = FPENet(Config.from_json(metadata["config"]))
    expected = tensors(model)
    _require(found.keys() == expected.keys(), f"{path}: tensors", f"the {len(expected)} of its config",
             f"{sorted(found.keys() - expected.keys())} too many, "
             f"{sorted(expected.keys() - found.keys())} missing")
    for name, tensor in found.items():
        _require(tensor.shape == expected[name].shape and tensor.dtype == torch.float32,
                 f"{path}: {name}", f"f32 {list(expected[name].shape)}",
                 f"{tensor.dtype} {list(tensor.shape)}")
    model.load_state_dict(found, strict=False)
    values = {field.name: json.loads(metadata[field.name]) for field in fields(Labels)}
    return model, Labels(**values)


def add_config_arguments(parser: argparse.ArgumentParser, *, classes: int = 19) -> None:
    """The config switches of the command line, under their SPEC names."""
    default = Config(classes=classes)
    group = parser.add_argument_group("network")
    for name in ("classes", "p", "q", "branches"):
        group.add_argument(f"--{name}", type=int, default=getattr(default, name), metavar="N")
    group.add_argument(
        "--dilations", type=lambda text: tuple(map(int, text.split(","))),
        default=default.dilations, metavar="1,2,4,8",
    )
    group.add_argument("--no-branch-addition", dest="branch_addition", action="store_false")
    group.add_argument("--no-long-skip", dest="long_skip", action="store_false")
    group.add_argument("--decoder", choices=("meu", "ca", "bilinear"), default=default.decoder)
    group.add_argument("--attention", choices=("relu", "sigmoid"), default=default.attention)
    group.add_argument("--block-activation", choices=("linear", "relu"), default=default.block_activation)


def config_from_arguments(arguments: argparse.Namespace) -> Config:
    return Config(**{field.name: getattr(arguments, field.name) for field in fields(Config)})


def self_test() -> None:
    """Checks the published totals, every switch's output shape, folding and the file round trip."""
    import tempfile

    for (p, q), expected in PARAMETER_TOTALS.items():
        found = parameter_count(FPENet(Config(p=p, q=q)))
        assert found == expected, f"p={p} q={q}: expected {expected} parameters, found {found}"
        print(f"p={p} q={q:2}: {found:,} parameters")

    torch.manual_seed(0)
    variants: list[dict[str, Any]] = [
        {}, {"branches": 2}, {"branches": 1}, {"branch_addition": False}, {"long_skip": False},
        {"decoder": "ca"}, {"decoder": "bilinear"}, {"attention": "sigmoid"},
        {"block_activation": "relu"}, {"long_skip": False, "decoder": "bilinear"},
    ]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "model.safetensors")
        for variant in variants:
            model = FPENet(Config(classes=5, p=2, q=2) if not variant
                           else Config(classes=5, p=1, q=2, **variant))
            for height, width in ((16, 16), (45, 67)):
                x = torch.randn(2, 3, height, width)
                model.train()(x)  # gives the running statistics something to hold
                y = model.eval()(x)
                assert y.shape == (2, 5, height, width), f"{variant}: found {list(y.shape)}"
                error = (fold_batch_norm(model)(x) - y).norm() / y.norm()
                assert error < 1e-5, f"{variant}: folding is off by {error:.1e}"
            save_model(path, model)
            loaded, labels = load_model(path)
            assert loaded.config == model.config and len(labels.classes) == 5
            assert torch.equal(loaded.eval()(x), y), f"{variant}: a reloaded model differs"
    print(f"{len(variants)} variants: shapes, folding and file round trip agree")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--self-test", action="store_true", required=True)
    parser.parse_args()
    self_test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
