"""Where the weights of a configured model lie on this machine, brought here first if need be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pie_core.config import DEFAULT_MODEL, Config, ModelConfig
from pie_core.contracts.driver import DriverDeclaration, ProgressCallback
from pie_core.errors import LoadError
from pie_core.models.fetch import fetch_default_model
from pie_core.models.hub import download_snapshot
from pie_core.models.store import stored_model


def resolve_model(model: ModelConfig, progress: ProgressCallback) -> Path:
    """A Hugging Face folder or a GGUF file. Blocks while it downloads; raises LoadError or FetchError."""
    if model.path is not None:
        return _existing(model.name, model.path)
    if model.repo is not None:
        return download_snapshot(model.repo, model.revision)
    if model.name == DEFAULT_MODEL:
        return fetch_default_model(progress)
    return stored_model(model.name)


def with_paths(
    config: Config, drivers: Mapping[str, DriverDeclaration], progress: ProgressCallback
) -> Config:
    """`config` with the path of every model that its driver reads; nothing is downloaded after this."""
    models = (_with_path(model, drivers, progress) for model in config.models)
    return replace(config, models=tuple(models))


def _with_path(
    model: ModelConfig, drivers: Mapping[str, DriverDeclaration], progress: ProgressCallback
) -> ModelConfig:
    declaration = drivers.get(model.driver.type)
    if declaration is None or not declaration.needs_checkpoint:
        return model
    return replace(model, path=resolve_model(model, progress), repo=None, revision=None)


def _existing(name: str, path: Path) -> Path:
    if not path.exists():
        raise LoadError(f"model {name}: {path} does not exist; correct its `path`, or see `pie model list`")
    return path
