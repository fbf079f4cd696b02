"""Begins to export spans: the one place that loads the library, an optional extra, and tells when it is missing."""

from __future__ import annotations

from pie_core.errors import ConfigError
from pie_core.telemetry.tracing import TraceSettings, Tracing


def start_tracing(settings: TraceSettings, role: str) -> Tracing:
    """`role` is this process's part in pie. Raises ConfigError where the library is missing."""
    try:
        from pie_core.telemetry.open_telemetry import OpenTelemetry, provider_of
    except ModuleNotFoundError as error:
        raise ConfigError(missing(settings.exporter, error.name or str(error))) from error
    return OpenTelemetry(provider_of(settings, role))


def missing(exporter: str, module: str) -> str:
    return (
        f"telemetry.traces.exporter is {exporter}, which needs the module {module}, not installed here: "
        "pip install 'pie-core[telemetry]', or set it to none"
    )
