"""The frontier as a picture: how busy the driver is over the number of guests, one panel for each step time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log10

# Colours that the colour-blind tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 210, 150, 46, 54, 24

Curve = Sequence[tuple[int, float]]  # guests and utilisation
Panel = Mapping[str, Curve]  # by kind of guest


def frontier_svg(panels: Mapping[float, Panel]) -> str:
    """`panels` by step time in milliseconds."""
    kinds = list(dict.fromkeys(kind for panel in panels.values() for kind in panel))
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_TOP + _HEIGHT + 44}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *(_legend(place, kind) for place, kind in enumerate(kinds)),
    ]
    most = max(
        (guests for panel in panels.values() for curve in panel.values() for guests, _ in curve), default=1
    )
    for place, (step_ms, panel) in enumerate(panels.items()):
        parts += _panel(_LEFT + place * (_WIDTH + _GAP), step_ms, panel, kinds, most)
    return "\n".join([*parts, "</svg>\n"])


def _legend(place: int, kind: str) -> str:
    x = _LEFT + place * 190
    colour = _COLOURS[place % len(_COLOURS)]
    return f'<circle cx="{x}" cy="14" r="4" fill="{colour}"/><text x="{x + 9}" y="18">{escape(kind)}</text>'


def _panel(left: int, step_ms: float, panel: Panel, kinds: Sequence[str], most: int) -> list[str]:
    bottom = _TOP + _HEIGHT
    parts = [f'<text x="{left}" y="{_TOP - 10}" font-weight="bold">steps of {step_ms:g} ms</text>']
    for percent in (0, 25, 50, 75, 100):
        y = bottom - _HEIGHT * percent / 100
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#ddd"/>')
        if left == _LEFT:
            parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for guests in (1, 8, 64, 512):
        if guests <= most:
            x = left + _x(guests, most)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{guests}</text>')
    parts.append(f'<text x="{left + _WIDTH / 2}" y="{bottom + 31}" text-anchor="middle">guests</text>')
    for kind, curve in panel.items():
        parts.append(_curve(left, bottom, curve, _COLOURS[kinds.index(kind) % len(_COLOURS)], most))
    return parts


def _curve(left: int, bottom: int, curve: Curve, colour: str, most: int) -> str:
    points = [(left + _x(guests, most), bottom - _HEIGHT * min(busy, 1.0)) for guests, busy in curve]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>{dots}'


def _x(guests: int, most: int) -> float:
    return _WIDTH * log10(max(guests, 1)) / max(log10(most), 1e-9)
