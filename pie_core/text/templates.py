"""The checkpoint's own chat template: where it is found, and how messages become text by it.

Rendering gives what transformers' `apply_chat_template` gives. A template is foreign code: it runs in the bounded
sandbox of `bounded_jinja`. A checkpoint without one gets the written fallback, and `origin` says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from pie_core.errors import InvalidRequest, LimitExceeded, LoadError
from pie_core.text.bounded_jinja import MAX_TEXT, BoundedEnvironment
from pie_core.text.gguf_metadata import GgufMetadata

MAX_SOURCE = 2**20

FALLBACK_SOURCE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
FALLBACK_ORIGIN = "pie's fallback (the checkpoint has no chat template)"


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A template's text and where it was found."""

    text: str
    origin: str

    @property
    def is_fallback(self) -> bool:
        return self.origin == FALLBACK_ORIGIN


FALLBACK = TemplateSource(FALLBACK_SOURCE, FALLBACK_ORIGIN)

Message = dict[str, Any]  # "role", "content", and what else a template may look for


class ChatTemplate:
    """A compiled template with the special tokens it may name (`bos_token`, …)."""

    def __init__(self, source: TemplateSource, named_tokens: dict[str, str] | None = None) -> None:
        if len(source.text) > MAX_SOURCE:
            raise LoadError(f"chat template of {source.origin} is longer than {MAX_SOURCE} characters")
        self.source = source
        self.named_tokens = dict(named_tokens or {})
        self._environment = BoundedEnvironment()
        self._template = _compile(self._environment, source)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        now: datetime | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The whole conversation as text. It refuses with InvalidRequest, and oversteps with LimitExceeded."""
        known = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        given = self.named_tokens | {"tools": None, "documents": None} | (variables or {}) | known
        self._environment.start(now or datetime.now(), given)
        try:
            return self._write(given)
        except LimitExceeded as exc:
            raise LimitExceeded(f"{self._place(exc)}: {exc}") from exc
        except (MemoryError, RecursionError) as exc:
            raise LimitExceeded(f"{self._place(exc)}: {type(exc).__name__} while rendering") from exc
        except TemplateError as exc:
            raise InvalidRequest(f"{self._place(exc)}: {exc.message}") from exc
        except Exception as exc:  # foreign code may raise whatever Python's own operations raise
            raise InvalidRequest(f"{self._place(exc)}: {type(exc).__name__}: {exc}") from exc

    def _write(self, variables: dict[str, Any]) -> str:
        total, pieces = 0, []
        for piece in self._template.generate(variables):
            total += len(piece)
            if total > MAX_TEXT:
                raise LimitExceeded(f"it writes more than {MAX_TEXT} characters")
            pieces.append(piece)
        return "".join(pieces)

    def _place(self, error: BaseException) -> str:
        line = _template_line(error)
        return f"chat template of {self.source.origin}" + (f", line {line}" if line else "")


def _compile(environment: BoundedEnvironment, source: TemplateSource) -> Template:
    try:
        return environment.from_string(source.text)
    except TemplateSyntaxError as exc:
        raise LoadError(f"chat template of {source.origin}, line {exc.lineno}: {exc.message}") from exc
    except TemplateError as exc:  # an unknown filter or test has no line
        raise LoadError(f"chat template of {source.origin}: {exc.message}") from exc
    except (RecursionError, SyntaxError, MemoryError) as exc:  # nested deeper than Python compiles
        raise LoadError(f"chat template of {source.origin} is nested too deeply to be compiled") from exc


def _template_line(error: BaseException) -> int | None:
    """Jinja rewrites tracebacks, so that frames of the template carry its own line numbers."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return line


def template_from_gguf(metadata: GgufMetadata) -> TemplateSource:
    if "tokenizer.chat_template" not in metadata.values:
        return FALLBACK
    return TemplateSource(
        metadata.text("tokenizer.chat_template"), f"{metadata.path} (tokenizer.chat_template)"
    )


def template_from_directory(directory: Path) -> TemplateSource:
    """chat_template.jinja, else chat_template.json, else the entry of tokenizer_config.json, else the fallback."""
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        return template_from_file(own_file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        text = _named_default(read_json(directory / name).get("chat_template"), directory / name)
        if text is not None:
            return TemplateSource(text, str(directory / name))
    return FALLBACK


def template_from_file(path: Path) -> TemplateSource:
    try:
        return TemplateSource(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise LoadError(f"{path}: the chat template cannot be read: {exc}") from exc


def _named_default(entry: Any, path: Path) -> str | None:
    """A checkpoint may carry several templates as [{name, template}]; conversations use the one named "default"."""
    if entry is None or isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
    if isinstance(entry, dict) and isinstance(entry.get("default"), str):
        return str(entry["default"])
    raise LoadError(f"{path}: chat_template is neither text nor a list with an entry named 'default'")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise LoadError(f"{path}: not readable as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise LoadError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
