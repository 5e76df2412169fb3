"""DeepCluster's AlexNet: the 2012 widths without groups, BatchNorm instead of LRN, fc7 on top."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

# (channels, kernel, stride, padding); "pool" is a 3x3 max-pool of stride 2
LAYERS: tuple[tuple[int, int, int, int] | str, ...] = (
    (96, 11, 4, 2),
    "pool",
    (256, 5, 1, 2),
    "pool",
    (384, 3, 1, 1),
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    "pool",
)


def alexnet_bn(in_channels: int, image_size: int) -> nn.Module:
    """Images [b, in_channels, s, s] to fc7 before its ReLU, [b, 4096] (s >= 63).

    Layers, names and initialisation are those of DeepCluster's `models/alexnet.py`, cut before
    the last ReLU. Our one addition is the average pool to 6 x 6, which is the identity for images
    of 224 pixels, and lets other sizes in.
    """
    net = nn.Sequential(
        OrderedDict(
            features=_features(in_channels),
            avgpool=nn.AdaptiveAvgPool2d(6),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                nn.Dropout(0.5),
                nn.Linear(256 * 6 * 6, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(0.5),
                nn.Linear(4096, 4096),
            ),
        )
    )
    net.apply(_initialise)
    return net


def _features(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in LAYERS:
        if isinstance(layer, str):
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2))
            continue
        width, kernel, stride, padding = layer
        layers.append(nn.Conv2d(channels, width, kernel, stride, padding))
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
