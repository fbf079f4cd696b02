"""Which rotary embedding a configuration asks for, in the spellings that checkpoints use."""

from __future__ import annotations

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


Scaling = Llama3Scaling | LinearScaling | FrequencyDivisors | None


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
    raise section.error(f"rope_type is {kind!r}; implemented are default, linear and llama3")
