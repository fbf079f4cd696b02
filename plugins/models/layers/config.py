"""A strict reader of config.json: every key is used, known not to matter, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pie_core.errors import LoadError

V = TypeVar("V", int, float, bool, str)
C = TypeVar("C")

# Keys that do not change what a forward pass computes: training, generation, bookkeeping.
IGNORED = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "max_window_layers",
        "model_type",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "rope_interleaved",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

_REQUIRED: Any = object()


class ConfigKeys:
    """The keys of one config.json (or of GGUF metadata under the same names), ticked off as they are read."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.origin = origin
        self._values = values
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        return self._typed(key, int, default)

    def number(self, key: str, default: float = _REQUIRED) -> float:
        return float(self._typed(key, float, default))

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        return self._typed(key, bool, default)

    def text(self, key: str, default: str = _REQUIRED) -> str:
        return self._typed(key, str, default)

    def into(self, kind: type[C], **given: Any) -> C:
        """A dataclass: what is not given are keys of the same names, of the types that its fields have."""
        read: dict[Any, Any] = {int: self.integer, float: self.number, bool: self.flag, str: self.text}
        types = get_type_hints(kind)
        fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]  # a type variable cannot ask for a dataclass
        own = [each.name for each in fields if each.name not in given and each.default is dataclasses.MISSING]
        return kind(**{name: read[types[name]](name) for name in own}, **given)

    def section(self, *keys: str) -> ConfigKeys | None:
        """The mapping under the first of these keys that has one; None where none has."""
        found = None
        for key in keys:
            value = self._pop(key)
            if value is not None and not isinstance(value, Mapping):
                raise self.error(f"{key} is {value!r}, expected a mapping or null")
            if value and found is None:
                found = ConfigKeys(value, f"{self.origin}: {key}")
        return found

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._pop(key)
        if not isinstance(value, list | tuple):
            raise self.error(f"{key} is {value!r}, expected a list of numbers")
        return tuple(_number(each) for each in value)

    def integers(self, key: str) -> tuple[int, ...]:
        """None is no numbers."""
        return self._list(key, int) or ()

    def texts(self, key: str) -> tuple[str, ...] | None:
        return self._list(key, str)

    def only(self, key: str, *allowed: object) -> None:
        """Reads a key that this architecture supports in some settings only. An absent key is fine."""
        value = self._pop(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(each) for each in allowed)
            raise self.error(f"{key} is {value!r}; this architecture is implemented for {known}")

    def only_all(self, key: str, *allowed: object) -> None:
        """The same for a list, each item of which must be one of `allowed`."""
        for value in self._pop(key) or ():
            if value not in allowed:
                known = " or ".join(repr(each) for each in allowed)
                raise self.error(f"{key} names {value!r}; this architecture is implemented for {known}")

    def ignore(self, *keys: str) -> None:
        self._read.update(keys)

    def finish(self) -> None:
        """Refuses what nobody has read and what may matter: unknown keys with a value."""
        unread = self._values.keys() - self._read - IGNORED
        meaningful = [key for key in sorted(unread) if self._values[key] and not key.startswith("_")]
        if meaningful:
            listed = ", ".join(f"{key}={_short(self._values[key])}" for key in meaningful)
            raise self.error(
                f"these keys may change the computation and are not implemented: {listed}; remove them if they do not"
                " matter for this checkpoint, or use an architecture plugin that knows them"
            )

    def error(self, text: str) -> LoadError:
        return LoadError(f"{self.origin}: {text}")

    def _pop(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _list(self, key: str, kind: type[V]) -> tuple[V, ...] | None:
        value = self._pop(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(type(each) is not kind for each in value):
            raise self.error(f"{key} is {value!r}, expected a list of {kind.__name__}")
        return tuple(value)

    def _typed(self, key: str, kind: type[V], default: Any) -> V:
        value = self._pop(key)
        if value is None and default is not _REQUIRED:
            value = default
        if value is None:
            raise self.error(f"{key} is missing; expected {kind.__name__}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(f"{key} is {value!r}, expected {kind.__name__}")
        found: V = value
        return found


def _number(value: Any) -> float:
    """transformers writes what JSON has no number for as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
