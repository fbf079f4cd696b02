"""Which rotary embedding a configuration asks for, in the spellings that checkpoints use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pie_plugins.models.layers.config import ConfigKeys


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies are stretched by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class LinearScaling:
    factor: float


@dataclass(frozen=True, slots=True)
class FrequencyDivisors:
    """One divisor for each frequency: how GGUF stores llama3 scaling."""

    divisors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Dimensions that turn less than `beta_slow` times in the original context are stretched by `factor`, those that
    turn more than `beta_fast` times kept, those between blended."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    magnitude: float  # of cosines and sines
    softmax_magnitude: float  # latent attention multiplies its softmax scale by the square of this


Scaling = Llama3Scaling | LinearScaling | FrequencyDivisors | YarnScaling | None


@dataclass(frozen=True, slots=True)
class RopeSettings:
    theta: float
    scaling: Scaling


def read_rope(keys: ConfigKeys, default_theta: float) -> RopeSettings:
    """From `rope_theta` and `rope_scaling`, or from the newer `rope_parameters` that holds both."""
    outer_theta = keys.number("rope_theta", default_theta)
    section = keys.section("rope_parameters", "rope_scaling")
    if section is None:
        return RopeSettings(outer_theta, None)
    theta = section.number("rope_theta", outer_theta)
    scaling = _scaling(section)
    section.finish()
    return RopeSettings(theta, scaling)


def _scaling(section: ConfigKeys) -> Scaling:
    older = section.text("type", "default")
    kind = section.text("rope_type", older)
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(section.number("factor"))
    if kind == "divisors":
        return FrequencyDivisors(section.numbers("divisors"))
    if kind == "llama3":
        return Llama3Scaling(
            section.number("factor"),
            section.number("low_freq_factor"),
            section.number("high_freq_factor"),
            section.integer("original_max_position_embeddings"),
        )
    if kind == "yarn":
        return _yarn(section)
    raise section.error(f"rope_type is {kind!r}; implemented are default, linear, llama3 and yarn")


def _yarn(section: ConfigKeys) -> YarnScaling:
    factor = section.number("factor")
    numerator, denominator = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    if numerator and denominator:
        magnitude = _yarn_magnitude(factor, numerator) / _yarn_magnitude(factor, denominator)
    else:
        magnitude = _yarn_magnitude(factor, 1.0)
    section.only("truncate", True)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        magnitude=section.number("attention_factor", magnitude),
        softmax_magnitude=_yarn_magnitude(factor, denominator) if denominator else 1.0,
    )


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
