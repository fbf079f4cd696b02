"""Constraints on what may be generated. This version can declare them, not yet compile or apply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

from inferlet.errors import not_in_this_version
from inferlet.model import Model, Tokenizer


@runtime_checkable
class Constraint(Protocol):
    """Says after each step which tokens may come next, as run lengths beginning with forbidden."""

    def step(self, accepted: list[int]) -> list[int]: ...


@runtime_checkable
class Schema(Protocol):
    """A declaration that becomes a constraint for a model."""

    def build_constraint(self, model: Model) -> Constraint: ...


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that follows a schema."""

    schema: str

    def build_constraint(self, model: Model) -> Constraint:
        raise not_in_this_version("JsonSchema.build_constraint")


@dataclass(frozen=True, slots=True)
class AnyJson:
    """Any JSON value."""

    def build_constraint(self, model: Model) -> Constraint:
        raise not_in_this_version("AnyJson.build_constraint")


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that matches a regular expression."""

    pattern: str

    def build_constraint(self, model: Model) -> Constraint:
        raise not_in_this_version("Regex.build_constraint")


@dataclass(frozen=True, slots=True)
class Ebnf:
    """Text of a grammar in EBNF."""

    source: str

    def build_constraint(self, model: Model) -> Constraint:
        raise not_in_this_version("Ebnf.build_constraint")


class Grammar:
    """A compiled grammar."""

    @classmethod
    def from_json_schema(cls, schema: str) -> NoReturn:
        raise not_in_this_version("Grammar.from_json_schema")

    @classmethod
    def json(cls) -> NoReturn:
        raise not_in_this_version("Grammar.json")

    @classmethod
    def from_regex(cls, pattern: str) -> NoReturn:
        raise not_in_this_version("Grammar.from_regex")

    @classmethod
    def from_ebnf(cls, ebnf: str) -> NoReturn:
        raise not_in_this_version("Grammar.from_ebnf")


class Matcher:
    """The state of a grammar along a text."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        raise not_in_this_version("Matcher")


class GrammarConstraint:
    """A constraint by a grammar."""

    def __init__(self, matcher: Matcher) -> None:
        raise not_in_this_version("GrammarConstraint")

    @classmethod
    def from_grammar(cls, grammar: Any, model: Model) -> NoReturn:
        raise not_in_this_version("GrammarConstraint.from_grammar")

    @classmethod
    def from_json_schema(cls, schema: str, model: Model) -> NoReturn:
        raise not_in_this_version("GrammarConstraint.from_json_schema")

    @classmethod
    def json(cls, model: Model) -> NoReturn:
        raise not_in_this_version("GrammarConstraint.json")

    @classmethod
    def from_regex(cls, pattern: str, model: Model) -> NoReturn:
        raise not_in_this_version("GrammarConstraint.from_regex")

    @classmethod
    def from_ebnf(cls, ebnf: str, model: Model) -> NoReturn:
        raise not_in_this_version("GrammarConstraint.from_ebnf")
