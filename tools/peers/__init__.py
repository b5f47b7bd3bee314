"""The networks beside FPENet in its paper's Table 7, written from their papers, to be timed.

Randomly initialised: speed does not depend on the weights. Their accuracy is nobody's claim here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from comparing import Call, Timer, Unavailable, timed, timed_by_gpu
from fpenet_torch import Config, FPENet
from peers.bisenet import BiSeNet
from peers.cgnet import CGNet
from peers.contextnet import ContextNet
from peers.enet import ENet
from peers.espnet import ESPNet
from peers.espnetv2 import ESPNetV2
from peers.icnet import ICNet

CLASSES = 19

Size = tuple[int, int]


@dataclass(frozen=True)
class Peer:
    """A network, and how many parameters its own paper gives it (None where it gives none)."""

    make: Callable[[], nn.Module]
    published: float | None


NETWORKS = {
    "FPENet": Peer(lambda: FPENet(Config(classes=CLASSES)), 0.378e6),
    "ENet": Peer(lambda: ENet(CLASSES), 0.37e6),
    "ESPNet": Peer(lambda: ESPNet(CLASSES), 0.364e6),
    "ESPNetv2": Peer(lambda: ESPNetV2(CLASSES), None),
    "CGNet": Peer(lambda: CGNet(CLASSES), 0.5e6),
    "ContextNet": Peer(lambda: ContextNet(CLASSES), 0.85e6),
    "BiSeNet-R18": Peer(lambda: BiSeNet(CLASSES), None),
    "ICNet": Peer(lambda: ICNet(CLASSES), None),
}

# Frames per second in the FPENet paper's Table 7 (TITAN V), by width and height. Only its own network's
# figures were at hand when this was written; those of the others are left out rather than guessed.
PAPER_FPS: dict[str, dict[Size, int]] = {
    "FPENet": {(768, 384): 129, (1024, 512): 102, (1536, 768): 55},
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parameters(name: str) -> int:
    """Trainable parameters of a network."""
    return count(NETWORKS[name].make())


def build(name: str, size: Size, device: str, threads: int) -> tuple[Call, Timer]:
    """A forward pass in f32 on random input, as the paper timed it: eager, batch 1."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("PyTorch finds no CUDA GPU")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = NETWORKS[name].make().eval().to(device)
    width, height = size
    x = torch.randn(1, 3, height, width, device=device)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    class Forward:
        def __call__(self) -> torch.Tensor:
            return call()

        def output(self) -> np.ndarray:
            return call().float().cpu().numpy()

    return Forward(), timed_by_gpu if device == "cuda" else timed


def check(name: str) -> None:
    """Logits at the input's size, also an odd one, and as many parameters as published, to a tenth."""
    peer = NETWORKS[name]
    model = peer.make().eval()
    for height, width in ((128, 192), (97, 131)):
        with torch.inference_mode():
            found = tuple(model(torch.randn(1, 3, height, width)).shape)
        assert found == (1, CLASSES, height, width), f"{name}: {found}"
    if peer.published is not None:
        ratio = count(model) / peer.published
        assert 0.9 < ratio < 1.1, f"{name}: {count(model)} parameters, published {peer.published:.3g}"
