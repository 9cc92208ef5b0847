"""How the variants of a study are told apart in its pictures."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from rfjax.evaluation.study import Variant, show_value

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""The colour-blind-safe palette of Okabe and Ito, grey in place of yellow, which white swallows."""
_BESIDE = ("#D55E00", "#CC79A7", "#8C8C8C", "#E69F00")
"""Those of them that stand out from the colours of an axis."""
Line = Literal["-", "--", ":", "-."]
_LINES: tuple[Line, ...] = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_MANY = 6
"""From so many values on, a setting has an axis instead of a colour for each value."""
SCALE = [to_hex(matplotlib.colormaps["viridis"](place)) for place in np.linspace(0, 0.92, 256)]
"""Colours of an axis, from its lowest to its highest value; all are dark enough on white."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting of one policy of which a study has many values."""

    policy: str
    """What `create` takes."""
    setting: str
    values: dict[str, float]
    """Of each variant of the policy, by its name."""
    curves: dict[str, str]
    """What else distinguishes each variant; those of one curve differ in the setting alone."""

    def color(self, name: str) -> str:
        """Return a variant's colour."""
        low, high = min(self.values.values()), max(self.values.values())
        return SCALE[round((len(SCALE) - 1) * (self.values[name] - low) / (high - low))]


@dataclasses.dataclass(frozen=True)
class Look:
    """Of one variant."""

    color: str
    line: Line
    marker: str


def find_axis(variants: Sequence[Variant]) -> Axis | None:
    """Return the setting with the most values, where they are many numbers."""
    best = None
    for policy in dict.fromkeys(variant.policy_name for variant in variants):
        members = [variant for variant in variants if variant.policy_name == policy]
        for setting in dict.fromkeys(key for variant in members for key in variant.settings):
            swept = [v for v in members if type(v.settings.get(setting)) in (int, float)]
            values = {variant.name: float(variant.settings[setting]) for variant in swept}
            count = len(set(values.values()))
            if count >= _MANY and (best is None or count > len(set(best.values.values()))):
                best = Axis(policy, setting, values, {v.name: _others(v, setting) for v in swept})
    return best


def _others(variant: Variant, setting: str) -> str:
    texts = [f"{key}={show_value(value)}" for key, value in variant.settings.items() if key != setting]
    return ",".join([variant.policy_name, *texts])


def looks_of(variants: Sequence[Variant], axis: Axis | None) -> dict[str, Look]:
    """Return a look for each variant: on the axis by its value, beside it by its place in the study."""
    palette = _BESIDE if axis else PALETTE
    curves = list(dict.fromkeys(axis.curves.values())) if axis else []
    looks, beside = {}, 0
    for variant in variants:
        if axis and variant.name in axis.values:
            kind = curves.index(axis.curves[variant.name]) % len(_LINES)
            looks[variant.name] = Look(axis.color(variant.name), _LINES[kind], _MARKERS[kind])
        else:
            kind = beside // len(palette) % len(_LINES)
            looks[variant.name] = Look(palette[beside % len(palette)], _LINES[kind], _MARKERS[kind])
            beside += 1
    return looks


def some(names: Sequence[str], most: int) -> list[str]:
    """Return at most so many, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[int(index)] for index in np.linspace(0, len(names) - 1, most).round()]
