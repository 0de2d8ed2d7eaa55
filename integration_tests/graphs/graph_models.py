"""Networks as their authors wrote them, for tests of exported graphs: of the real shapes, or small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan


def _norm(layer: nn.Module, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), *after)


class Basic(nn.Module):
    """Two convolutions and what was before (He et al., 2015)."""

    grows = 1

    def __init__(self, ins: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(nn.Conv2d(ins, width, 3, stride, 1, bias=False), nn.ReLU(inplace=True)),
            _norm(nn.Conv2d(width, width, 3, 1, 1, bias=False)),
        )
        self.aside = None if ins == width and stride == 1 else _norm(nn.Conv2d(ins, width, 1, stride, bias=False))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += x if self.aside is None else self.aside(x)
        return self.relu(y)


class Bottleneck(Basic):
    """Three, the middle one narrow."""

    grows = 4

    def __init__(self, ins: int, width: int, stride: int) -> None:
        super().__init__(ins, 4 * width, stride)
        self.body = nn.Sequential(
            _norm(nn.Conv2d(ins, width, 1, bias=False), nn.ReLU(inplace=True)),
            _norm(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.ReLU(inplace=True)),
            _norm(nn.Conv2d(width, 4 * width, 1, bias=False)),
        )


class ResNet(nn.Module):
    """Depths (2, 2, 2, 2) of `Basic` are ResNet-18, (3, 4, 6, 3) of `Bottleneck` ResNet-50."""

    def __init__(self, block: type[Basic], depths: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        self.stem = _norm(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.ReLU(inplace=True))
        self.pool, blocks, ins = nn.MaxPool2d(3, 2, 1), [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(block(ins, width << stage, 2 if stage and not i else 1))
                ins = (width << stage) * block.grows
        self.blocks, self.mean, self.head = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Linear(ins, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.mean(self.blocks(self.pool(self.stem(x)))), 1))


class Squeeze(nn.Module):
    """Channels weighed by what all of them are (Hu et al., 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        few = max(channels // 4 // 8 * 8, 8)
        self.mean, self.down, self.up = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, few, 1),
            nn.Conv2d(few, channels, 1),
        )
        self.relu, self.gate = nn.ReLU(inplace=True), nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.relu(self.down(self.mean(x)))))


class Inverted(nn.Module):
    """Wide between narrow ends, channel by channel in the middle (Howard et al., 2019)."""

    def __init__(self, ins: int, kernel: int, wide: int, outs: int, *, squeeze: bool, hard: bool, stride: int) -> None:
        super().__init__()
        act = nn.Hardswish if hard else nn.ReLU
        self.body = nn.Sequential(
            _norm(nn.Conv2d(ins, wide, 1, bias=False), act(inplace=True)) if wide != ins else nn.Identity(),
            _norm(nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False), act(inplace=True)),
            Squeeze(wide) if squeeze else nn.Identity(),
            _norm(nn.Conv2d(wide, outs, 1, bias=False)),
        )
        self.adds = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


# Kernel, wide, outs, squeeze, hard, stride, of MobileNet-V3-Large.
_LARGE = (
    *((3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1)),
    *(
        (5, 120, 40, 1, 0, 1),
        (3, 240, 80, 0, 1, 2),
        (3, 200, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1),
    ),
    *((3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1)),
    (5, 960, 160, 1, 1, 1),
)


class MobileNet(nn.Module):
    """MobileNet-V3-Large, or its first blocks."""

    def __init__(self, blocks: int = len(_LARGE)) -> None:
        super().__init__()
        parts, ins = [_norm(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.Hardswish(inplace=True))], 16
        for kernel, wide, outs, squeeze, hard, stride in _LARGE[:blocks]:
            how = {"squeeze": bool(squeeze), "hard": bool(hard), "stride": stride}
            parts.append(Inverted(ins, kernel, wide, outs, **how))
            ins = outs
        parts.append(_norm(nn.Conv2d(ins, 6 * ins, 1, bias=False), nn.Hardswish(inplace=True)))
        self.body, self.mean = nn.Sequential(*parts), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(6 * ins, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.mean(self.body(x)), 1))


class LSTM(nn.Module):
    """A long short-term memory over rows, as a scan, and what it remembers at last."""

    def __init__(self, ins: int = 16, width: int = 32) -> None:
        super().__init__()
        self.x, self.h, self.head = nn.Linear(ins, 4 * width), nn.Linear(width, 4 * width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        def step(carry: tuple[Tensor, Tensor], row: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            h, c = carry
            let_in, forget, new, let_out = (self.x(row) + self.h(h)).chunk(4, -1)
            c = forget.sigmoid() * c + let_in.sigmoid() * new.tanh()
            h = let_out.sigmoid() * c.tanh()
            return (h, c), h.clone()

        zeros = x.new_zeros(x.shape[1], self.h.in_features)
        (h, _), _ = scan(step, (zeros, zeros.clone()), x)
        return self.head(h)


class GRU(nn.Module):
    """A gated recurrent unit over rows, as a loop."""

    def __init__(self, ins: int = 16, width: int = 32) -> None:
        super().__init__()
        self.x, self.h, self.head = nn.Linear(ins, 3 * width), nn.Linear(width, 3 * width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        def body(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            given = self.x(x.index_select(0, i.view(1)).squeeze(0)).chunk(3, -1)
            kept = self.h(h).chunk(3, -1)
            reset, update = ((given[n] + kept[n]).sigmoid() for n in (0, 1))
            new = (given[2] + reset * kept[2]).tanh()
            return i + 1, new + update * (h - new)

        zeros = x.new_zeros(x.shape[1], self.h.in_features)
        start = torch.zeros((), dtype=torch.int64)
        _, h = torch.while_loop(lambda i, h: i < x.shape[0], body, (start, zeros))
        return self.head(h)
