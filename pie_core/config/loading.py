"""A configuration file -> Config, with relative paths made absolute and options knowing their lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pie_core.config.document import Document, parse_document, read_document
from pie_core.config.options import Options
from pie_core.config.places import Place
from pie_core.config.tree import Config, ModelConfig
from pie_core.config.validation import parse, without_empty_headings
from pie_core.errors import ConfigError
from pie_core.paths import default_config_file


def load_config(file: Path | None = None) -> Config:
    """The configuration in `file`; without one that of PIE_HOME, and without that the defaults."""
    chosen = file or existing_default_file()
    return Config() if chosen is None else read_config(chosen)


def existing_default_file() -> Path | None:
    file = default_config_file()
    return file if file.is_file() else None


def read_config(file: Path) -> Config:
    if not file.exists():
        raise ConfigError(
            f"{file}: no such file; `pie config init` writes one, and without -c the defaults are used"
        )
    return _config(read_document(file), file.absolute().parent)


def parse_config(text: str, source: str, folder: Path) -> Config:
    """The configuration in `text`, as if it stood in a file of `folder`."""
    return _config(parse_document(text, source), folder)


def _config(document: Document, folder: Path) -> Config:
    config = parse(Config, without_empty_headings(Config, document.data), document.place)
    models = (
        _settled_model(model, folder, document.place.at("models", i)) for i, model in enumerate(config.models)
    )
    return replace(
        config,
        models=tuple(models),
        runtime=replace(config.runtime, program_cache=_settled(config.runtime.program_cache, folder)),
        server=replace(
            config.server,
            tls_cert=_settled(config.server.tls_cert, folder),
            tls_key=_settled(config.server.tls_key, folder),
        ),
        auth=replace(config.auth, file=_settled(config.auth.file, folder)),
        telemetry=replace(
            config.telemetry,
            traces=replace(config.telemetry.traces, file=_settled(config.telemetry.traces.file, folder)),
        ),
    )


def _settled_model(model: ModelConfig, folder: Path, place: Place) -> ModelConfig:
    options = Options(model.driver.options, place.at("driver", "options"))
    return replace(model, path=_settled(model.path, folder), driver=replace(model.driver, options=options))


def _settled(path: Path | None, folder: Path) -> Path | None:
    return None if path is None else _absolute(path, folder)


def _absolute(path: Path, folder: Path) -> Path:
    return folder / path.expanduser()
