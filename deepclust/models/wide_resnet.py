"""Wide residual networks for small images, as the semi-supervised literature compares them.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. The choices are those of Oliver et
al., "Realistic Evaluation of Deep Semi-Supervised Learning Algorithms", NeurIPS 2018. ReLUs are
leaky with a slope of 0.1, and the first block activates before its shortcut. Their batch norms keep
0.999 of the running statistics in a step, which needs thousands of steps. Here they keep torch's
0.9, and `train.average_from` measures the statistics again at the end.
"""

from __future__ import annotations

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

SLOPE = 0.1


class Block(nn.Module):
    """Norm, activation, 3x3 convolution, twice, beside a shortcut [b, before, h, w].

    `first` says that the shortcut starts after the first activation.
    """

    def __init__(self, before: int, after: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = _conv(before, after, 3, stride)
        self.conv2 = _conv(after, after, 3, 1)
        self.act = nn.LeakyReLU(SLOPE)
        changes = before != after or stride > 1
        self.shortcut = _conv(before, after, 1, stride) if changes else nn.Identity()
        self.first = first

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Return the shortcut plus the residual."""
        active = self.act(self.norm1(maps))
        residual = self.conv2(self.act(self.norm2(self.conv1(active))))
        summed: Tensor = self.shortcut(active if self.first else maps) + residual
        return summed


def wide_resnet(depth: int, width: int, in_channels: int, image_size: int) -> nn.Module:
    """Build WRN-depth-width: images [b, in_channels, h, w] to the pooled last map, [b, 64 width].

    Depth is 6 n + 4 for n blocks in each of three stages of 16, 32 and 64 times `width` channels.
    The last maps are h/4 x w/4, which any size above 3 pixels fills.
    """
    blocks, rest = divmod(depth - 4, 6)
    assert rest == 0, f"a depth of {depth} is not 6 n + 4"
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv(in_channels, 16, 3, 1))
    before = 16
    for number, after in enumerate((16 * width, 32 * width, 64 * width)):
        chain = []
        for block in range(blocks):
            stride = 2 if number > 0 and block == 0 else 1
            chain.append(Block(before, after, stride, first=number == block == 0))
            before = after
        stages[f"stage{number + 1}"] = nn.Sequential(*chain)
    stages["last"] = nn.Sequential(nn.BatchNorm2d(before), nn.LeakyReLU(SLOPE))
    stages["avgpool"], stages["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(stages)


def _conv(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")
    return conv
