"""Whether this machine can do what a configuration asks for, found out without loading a model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pie_core.config import Config, ModelConfig, parse_options
from pie_core.errors import ConfigError, PluginError
from pie_core.telemetry.exporting import missing

_EXPORTERS = {"otlp": ("opentelemetry.exporter.otlp.proto.http",)}

if TYPE_CHECKING:
    from pie_core.contracts.driver import DriverDeclaration
    from pie_core.plugins import PluginRegistry


def require_usable(config: Config, registry: PluginRegistry) -> None:
    """Raises ConfigError that lists every problem of the drivers and their options."""
    problems = [problem for model in config.models for problem in _problems(model, registry)]
    problems += _problems_of_traces(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _problems_of_traces(config: Config) -> list[str]:
    exporter = config.telemetry.traces.exporter
    needed = () if exporter == "none" else ("opentelemetry.sdk", *_EXPORTERS.get(exporter, ()))
    return [missing(exporter, module) for module in needed if not _is_installed(module)][:1]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it
        return False


def missing_modules(declaration: DriverDeclaration) -> list[str]:
    """What a driver needs and this environment lacks."""
    return [module for module in declaration.requires if find_spec(module.partition(".")[0]) is None]


def _problems(model: ModelConfig, registry: PluginRegistry) -> Iterator[str]:
    place = model.driver.options.place.beside("type")
    try:
        declaration = registry.driver(model.driver.type)
        parse_options(declaration.options, model.driver.options)
    except PluginError as error:
        yield str(place.error(str(error)))
        return
    except ConfigError as error:
        yield str(error)
        return
    if missing := missing_modules(declaration):
        yield str(
            place.error(f"the driver {declaration.name} needs {', '.join(missing)}, not installed here")
        )
