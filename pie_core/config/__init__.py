"""The configuration: one strict YAML file -> one tree of frozen dataclasses."""

from __future__ import annotations

from pie_core.config.loading import existing_default_file, load_config, parse_config, read_config
from pie_core.config.options import Options, parse_options
from pie_core.config.places import Place
from pie_core.config.tree import (
    DEFAULT_MODEL,
    AuthConfig,
    Config,
    DriverConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    ServerConfig,
    TelemetryConfig,
)
from pie_core.config.validation import Misfit

__all__ = [
    "DEFAULT_MODEL",
    "AuthConfig",
    "Config",
    "DriverConfig",
    "Misfit",
    "ModelConfig",
    "Options",
    "Place",
    "RuntimeConfig",
    "SchedulerConfig",
    "ServerConfig",
    "TelemetryConfig",
    "existing_default_file",
    "load_config",
    "parse_config",
    "parse_options",
    "read_config",
]
