"""`Pie.toml`, the manifest of a program: what it is called, how it is started, what it takes and what it asks for.

    [package]                       name and version; description, authors, … for people
    kind = "run"                    or "http", "service"
    entry = "main.py"               or a component, such as "program.wasm"
    [parameters]                    each a table: type, optional, default, description
    [capabilities]                  network, files, children, limits: what it needs beyond the model

Whoever launches a program asks `checked_input` about its input and `require_granted` about its capabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from pie_core.config.annotations import Expects
from pie_core.config.document import Document
from pie_core.config.places import Place
from pie_core.config.toml_document import decode_toml, read_toml
from pie_core.config.validation import Misfit, parse
from pie_core.errors import ConfigError, InvalidRequest, LimitExceeded, ProgramError, Unsupported
from pie_core.naming import nearest

FILE = "Pie.toml"
ENTRY = "main.py"
POSITIONAL = "_positional"  # where `pie run` puts arguments without a name

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"
VERSION_PATTERN = r"^(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}$"

Kind = Literal["run", "http", "service"]
ParameterType = Literal["string", "int", "float", "bool", "list", "json"]
Text = Annotated[str, Field(min_length=1)]

_WORDS: Mapping[str, str] = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "json": "any JSON value",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Who a program is."""

    name: Annotated[
        str, Expects("a letter, then letters, digits, - and _, 64 at most"), Field(pattern=NAME_PATTERN)
    ]
    version: Annotated[
        str, Expects("MAJOR.MINOR.PATCH in digits, such as 0.1.0"), Field(pattern=VERSION_PATTERN)
    ]
    description: str = ""
    authors: tuple[str, ...] = ()
    license: str = ""
    repository: str = ""
    readme: str = ""
    kind: Kind = "run"
    entry: Text = ENTRY


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One key of a program's input."""

    type: ParameterType
    optional: bool = False
    default: Any = None
    description: str = ""

    def __post_init__(self) -> None:
        if self.default is not None and not _fits(self.default, self.type):
            raise Misfit(f"expected {_WORDS[self.type]}, but found {_shown(self.default)}", "default")

    @property
    def required(self) -> bool:
        return not self.optional and self.default is None


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedLimits:
    """What a program needs of its limits; None takes what the server gives."""

    memory_mb: Annotated[int | None, Field(ge=1)] = None
    cpu_s: Annotated[float | None, Field(gt=0)] = None
    wall_s: Annotated[float | None, Field(gt=0)] = None
    output_bytes: Annotated[int | None, Field(ge=1)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a program asks for beyond the model and its own client."""

    network: tuple[Text, ...] = ()  # hosts, each with a port if it is only one
    files: tuple[Text, ...] = ()  # folders by name, such as "scratch"
    children: Annotated[int, Field(ge=0)] = 0  # programs that it may run at a time
    limits: AskedLimits = field(default_factory=AskedLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """The tables of the file."""

    package: Package
    runtime: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] | None = None  # without the table the input is the program's own affair
    capabilities: Capabilities = field(default_factory=Capabilities)
    dependencies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dependencies:
            raise Misfit(
                f"found {', '.join(self.dependencies)}, but components are not linked together here;"
                " put what the program needs into its folder",
                "dependencies",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the file says, and its text as it came."""

    package: Package
    parameters: Mapping[str, Parameter]
    extra_parameters: bool  # whether the input may hold keys that are not declared
    capabilities: Capabilities
    runtime: Mapping[str, str]
    text: str

    @property
    def name(self) -> str:
        return self.package.name

    @property
    def version(self) -> str:
        return self.package.version

    @property
    def label(self) -> str:
        return f"{self.package.name}@{self.package.version}"


@dataclass(frozen=True, slots=True)
class Grants:
    """What a server gives to programs; network and files do not exist yet."""

    kinds: tuple[Kind, ...] = ("run",)
    network: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    children: int = 0
    limits: AskedLimits = field(default_factory=AskedLimits)  # the most that is given; None is no bound


def version_key(version: str) -> tuple[int, ...]:
    """By which versions are ordered: 0.10.0 comes after 0.9.0."""
    return tuple(int(part) for part in version.split("."))


def require_version(version: str) -> str:
    """`version` as it is. Raises ProgramError unless it is MAJOR.MINOR.PATCH."""
    if not re.match(VERSION_PATTERN, version):
        raise ProgramError(f"version {version!r}: expected MAJOR.MINOR.PATCH in digits, such as 0.1.0")
    return version


def read_manifest(file: Path) -> Manifest:
    """Raises ProgramError with file, line and key of everything that is wrong."""
    try:
        return _manifest(read_toml(file), file.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ProgramError(str(error)) from None


def parse_manifest(text: str, source: str = FILE) -> Manifest:
    """Like `read_manifest`, of text that came from `source`."""
    try:
        return _manifest(decode_toml(text.encode("utf-8", errors="surrogatepass"), source), text)
    except ConfigError as error:
        raise ProgramError(str(error)) from None


def _manifest(document: Document, text: str) -> Manifest:
    file = parse(_File, document.data, document.place)
    place = document.place.at("parameters")
    parameters = {"extra": True} if file.parameters is None else file.parameters
    extra = parameters.get("extra")
    declared = {name: table for name, table in parameters.items() if (name, table) != ("extra", extra)}
    if isinstance(extra, dict):
        declared["extra"] = extra
    elif not isinstance(extra, bool | None):
        raise place.at("extra").error(
            f"expected true or false, or the table of a parameter, but found {_shown(extra)}"
        )
    return Manifest(
        package=file.package,
        parameters=_parameters(declared, place),
        extra_parameters=extra is True,
        capabilities=file.capabilities,
        runtime=file.runtime,
        text=text,
    )


def _parameters(tables: Mapping[str, object], place: Place) -> dict[str, Parameter]:
    """Raises ConfigError with the problems of all of them."""
    parameters: dict[str, Parameter] = {}
    problems: list[str] = []
    for name, table in tables.items():
        try:
            parameters[name] = parse(Parameter, table, place.at(name))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return parameters


def parse_input(given: str) -> dict[str, Any]:
    """Raises InvalidRequest."""
    try:
        arguments = msgspec.json.decode(given or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"the input is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"the input must be a JSON object, so that a program can look up its keys: {given[:60]}"
        )
    return arguments


def checked_input(manifest: Manifest, given: Mapping[str, Any]) -> dict[str, Any]:
    """The input with defaults filled in. Raises InvalidRequest that names every parameter, what it got and expects."""
    problems = [*_misfits(manifest, given), *_unknown(manifest, given)]
    if problems:
        raise InvalidRequest(f"{manifest.label}: {'; '.join(problems)}")
    defaults = {
        name: parameter.default
        for name, parameter in manifest.parameters.items()
        if parameter.default is not None
    }
    return {**defaults, **given}


def _misfits(manifest: Manifest, given: Mapping[str, Any]) -> Iterator[str]:
    for name, parameter in manifest.parameters.items():
        expected = _WORDS[parameter.type]
        if name not in given:
            if parameter.required:
                yield f"the parameter `{name}` is missing: expected {expected}{_said(parameter)}"
        elif given[name] is None and parameter.optional:
            continue
        elif not _fits(given[name], parameter.type):
            yield f"the parameter `{name}`: expected {expected}, but found {_shown(given[name])}"


def _unknown(manifest: Manifest, given: Mapping[str, Any]) -> Iterator[str]:
    if manifest.extra_parameters:
        return
    known = sorted(manifest.parameters)
    listing = f"Known: {', '.join(known)}" if known else "It takes none"
    for name in given:
        if name == POSITIONAL and name not in manifest.parameters:
            yield f"found the arguments {_shown(given[name])} without a name, and it takes none such. {listing}"
        elif name not in manifest.parameters:
            guess = nearest(name, known)
            question = f"; did you mean `{guess}`?" if guess else "."
            yield f"unknown parameter `{name}`{question} {listing}"


def _said(parameter: Parameter) -> str:
    return f" ({parameter.description})" if parameter.description else ""


def _fits(value: object, kind: ParameterType) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "list":
            return isinstance(value, list)
    return True


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_granted(manifest: Manifest, grants: Grants) -> None:
    """Raises Unsupported for what does not exist here, LimitExceeded for more than there is."""
    if manifest.package.kind not in grants.kinds:
        raise Unsupported(
            f"{manifest.label} is of kind {manifest.package.kind!r}: this pie runs programs of kind"
            f" {', '.join(grants.kinds)}; the others come later"
        )
    asked = manifest.capabilities
    _require_all(manifest.label, "network", asked.network, grants.network)
    _require_all(manifest.label, "files", asked.files, grants.files)
    if asked.children > grants.children:
        raise LimitExceeded(
            f"{_refusal(manifest.label, 'children', f'{asked.children} at a time', str(grants.children))}:"
            " raise `runtime.children_per_program` in its configuration, or ask for fewer"
        )
    _require_limits(manifest.label, asked.limits, grants.limits)


def _require_all(label: str, capability: str, asked: tuple[str, ...], granted: tuple[str, ...]) -> None:
    missing = [] if "*" in granted else [name for name in asked if name not in granted]
    if missing:
        raise Unsupported(_refusal(label, capability, ", ".join(missing), ", ".join(granted)))


def _refusal(label: str, capability: str, asked: str, granted: str) -> str:
    return f"{label} asks for {capability}: {asked}; this pie grants {granted or 'none'}"


_LIMITS = ("memory_mb", "cpu_s", "wall_s", "output_bytes")


def _require_limits(label: str, asked: AskedLimits, granted: AskedLimits) -> None:
    for name in _LIMITS:
        wanted, most = getattr(asked, name), getattr(granted, name)
        if wanted is not None and most is not None and wanted > most:
            raise LimitExceeded(
                f"{label} asks for limits.{name} = {wanted}; this pie grants {most}:"
                f" raise `runtime.{name}` in its configuration, or ask for less"
            )
