"""Rotation by three position axes, in the spellings that checkpoints use."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.config import ConfigKeys

AXES = 3  # time, row, column


@dataclass(frozen=True, slots=True)
class AxesRopeSettings:
    theta: float
    rotary_dim: int  # of each head, the first ones
    sections: tuple[int, ...]  # how many frequencies follow each axis


def read_axes_rope(
    keys: ConfigKeys, head_dim: int, sections: tuple[int, ...], factor: float = 1.0
) -> AxesRopeSettings:
    """`sections`, and `factor` of how much of each head rotates, hold where the configuration does not say."""
    outer_theta, outer_factor = keys.number("rope_theta", 0.0), keys.number("partial_rotary_factor", factor)
    section = keys.section("rope_parameters", "rope_scaling")
    section = section or ConfigKeys({}, keys.origin)
    section.only("rope_type", "default")
    section.only("type", "default", "mrope")
    section.only("mrope_interleaved", True)
    rotary_dim = int(head_dim * section.number("partial_rotary_factor", outer_factor))
    theta = section.number("rope_theta", outer_theta)
    sections = section.integers("mrope_section") or sections
    if len(sections) != AXES or sum(sections) * 2 != rotary_dim or theta <= 0:
        raise section.error(
            f"rope_theta is {theta} and mrope_section {sections}, expected a positive number and {AXES} numbers that"
            f" add up to {rotary_dim // 2}, half of the dimensions that rotate"
        )
    section.finish()
    return AxesRopeSettings(theta, rotary_dim, sections)
