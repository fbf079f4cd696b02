"""A Jinja environment for templates that came with a checkpoint: sandboxed, and bounded in time and memory.

Jinja's own sandbox keeps a template away from Python; it does not keep it from looping for ever or from asking for
a string of a terabyte. Here loops and macros count their turns, whatever makes text longer checks the length first,
and only filters and methods known to be bounded exist. A template may change lists that it made itself, never what it
was given. A template that oversteps raises LimitExceeded.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pie_core.errors import LimitExceeded

MAX_TEXT = 16 * 2**20  # characters of one string, and of the whole rendering
MAX_ITEMS = 250_000  # of a list that a template builds, and values in whatever it prints
MAX_TURNS = 1_000_000  # of all loops and macros together
MAX_SECONDS = 5.0
_TURNS_PER_CLOCK = 64
_MAX_INTEGER_BITS = 4096

_FILTERS = [
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "safe", "select", "selectattr", "sort", "sum", "title", "trim", "truncate", "unique",
    "upper", "urlencode", "wordcount", "indent", "join", "replace", "string", "striptags",
]  # fmt: skip
_STRING_METHODS = frozenset([
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "upper",
])  # fmt: skip
_LIST_CHANGES = frozenset(["append", "extend", "insert", "pop"])
# A width of four digits or more, or one taken from an argument: in str.format, and after a percent sign.
_WIDE_FORMAT = re.compile(r"\{[^{}]*(?:\d{4,}|\{)|%[^a-zA-Z%]*(?:\d{4,}|\*)")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """One environment renders one template at a time; `start` opens a fresh allowance."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlocks, loopcontrols],
            finalize=printable,
        )
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters |= {
            "tojson": _to_json,
            "indent": _indent,
            "string": _string,
            "join": _join,
            "replace": _replace,
        }
        self.globals = {"range": self.globals["range"], "dict": _dict, "namespace": _namespace}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now
        # Generated code and buffers join their pieces with this.
        self.concat = bounded_join  # type: ignore[method-assign]
        self.start(datetime.now())

    def start(self, now: datetime, given: Any = None) -> None:
        """`given` is everything that the template gets from outside."""
        self._turns = 0
        self._now = now
        self._given = given
        self._given_ids: set[int] | None = None
        self._deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Called once in each turn of a loop and each call of a macro."""
        self._turns += 1
        if self._turns > MAX_TURNS:
            raise LimitExceeded(f"it loops more than {MAX_TURNS} times")
        if self._turns % _TURNS_PER_CLOCK == 0 and time.monotonic() > self._deadline:
            raise LimitExceeded(f"it runs for more than {MAX_SECONDS:g} s")

    def concatenated(self, *values: Any) -> str:
        return bounded_join(str(printable(value)) for value in values)

    def weighed(self, value: Any) -> Any:
        """Called for each list, tuple or mapping that a template writes down."""
        _weigh(value, [MAX_ITEMS])
        return value

    def _strftime_now(self, form: str) -> str:
        return self._now.strftime(form)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Bounding().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, int | float | bytes):
            return False
        if isinstance(obj, list) and attr in _LIST_CHANGES:
            return not self._is_given(obj)
        return super().is_safe_attribute(obj, attr, value)

    def _is_given(self, value: list[Any]) -> bool:
        if self._given_ids is None:
            self._given_ids = set(_list_ids(self._given))
        return id(value) in self._given_ids

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_sum(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "**":
            _check_power(left, right)
        elif operator == "*":
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded_format(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return bounded_format

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            if name == "join" and args:
                return bounded_join(args[0], owner)
            if name == "replace":
                return _replace(owner, *args)  # Jinja passes only its own bookkeeping by keyword
        elif isinstance(owner, list) and getattr(obj, "__name__", "") in _LIST_CHANGES:
            self.tick()
            _weigh(args, [MAX_ITEMS])
            added = len(args[0]) if args and isinstance(args[0], list | tuple) else 0
            _check_items(len(owner) + max(added, 1))
        return super().call(context, obj, *args, **kwargs)


class GenerationBlocks(Extension):
    """`{% generation %}` marks what the model wrote, for training; rendering only passes it on."""

    tags = {"generation"}  # noqa: RUF012  the base class wants a plain set

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Bounding(NodeTransformer):
    """Puts a tick into every loop and macro, and sends `~` through a bounded join."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  Jinja's naming
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._ticking(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _environment_call("concatenated", node.nodes).set_lineno(node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        if node.ctx == "load":
            return self._weighed(node)
        self.generic_visit(node)  # what is assigned to
        return node

    def _weighed(self, node: nodes.Expr) -> nodes.Node:
        """Lists in lists in lists are quickly made, and slowly compared, hashed and sorted."""
        self.generic_visit(node)
        return _environment_call("weighed", [node]).set_lineno(node.lineno)

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:  # noqa: N802
        if node.attr.startswith("_"):
            raise TemplateSyntaxError(f"a namespace cannot hold {node.attr!r}", node.lineno)
        return node

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(_environment_call("tick", [])).set_lineno(node.lineno)
        node.body.insert(0, tick)
        return node  # type: ignore[no-any-return]


def _environment_call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _list_ids(value: Any) -> Iterator[int]:
    """Of all lists in `value`, however deep."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, list | tuple):
            waiting.extend(each)
            if isinstance(each, list):
                yield id(each)


def printable(value: Any) -> Any:
    """`value` itself, when printing it is affordable; nested containers are counted with every repetition."""
    if isinstance(value, str):
        _check_length(len(value))
    elif isinstance(value, list | tuple | dict | set):
        _weigh(value, [MAX_ITEMS])
    return value


def _weigh(value: Any, left: list[int]) -> None:
    left[0] -= 1 + (len(value) // 16 if isinstance(value, str) else 0)
    if left[0] < 0:
        raise LimitExceeded(f"it makes or prints a structure of more than {MAX_ITEMS} values")
    if isinstance(value, dict):
        for key, item in value.items():
            _weigh(key, left)
            _weigh(item, left)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _weigh(item, left)


def bounded_join(pieces: Iterable[Any], separator: str = "") -> str:
    total, kept = 0, []
    for piece in pieces:
        text = piece if isinstance(piece, str) else str(printable(piece))
        total += len(text) + len(separator)
        _check_length(total)
        kept.append(text)
    return separator.join(kept)


def _check_length(characters: int) -> None:
    if characters > MAX_TEXT:
        raise LimitExceeded(f"it makes a text of more than {MAX_TEXT} characters")


def _check_sum(left: Any, right: Any) -> None:
    if isinstance(left, str) and isinstance(right, str):
        _check_length(len(left) + len(right))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        _check_items(len(left) + len(right))


def _check_items(items: int) -> None:
    if items > MAX_ITEMS:
        raise LimitExceeded(f"it makes a list of more than {MAX_ITEMS} items")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(sequence, str):
            _check_length(len(sequence) * times)
        elif isinstance(times, int) and isinstance(sequence, list | tuple):
            _check_items(len(sequence) * times)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise LimitExceeded(f"it makes an integer of more than {_MAX_INTEGER_BITS} bits")


def _check_format(form: str, values: Iterable[Any]) -> None:
    if _WIDE_FORMAT.search(form):
        raise LimitExceeded(f"its format string {form[:40]!r} asks for a width of more than three digits")
    longest = max((len(str(printable(value))) for value in values), default=0)
    _check_length(len(form) + (longest + 1000) * (form.count("{") + form.count("%")))


def _replace(text: Any, old: str = "", new: str = "", count: int | None = None) -> str:
    whole, times = str(printable(text)), -1 if count is None else count
    _check_length(len(whole) + whole.count(old) * len(new))
    return whole.replace(old, new, times)


def _join(values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = [_item(value, attribute) for value in values]
    return bounded_join(values, str(d))


def _item(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (TypeError, LookupError):
        return ""


def _string(value: Any) -> str:
    return str(printable(value))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_indent(indent)
    return json.dumps(
        printable(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_indent(width)
    text = str(printable(text))
    _check_length(len(text) + 100 * text.count("\n"))
    return do_indent(text, width, first, blank)


def _check_indent(indent: int | str | None) -> None:
    wide = len(indent) if isinstance(indent, str) else indent or 0
    if wide > 100:
        raise LimitExceeded(f"it indents by {wide}; at most 100 is allowed")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    made = dict(*args, **kwargs)
    _weigh(made, [MAX_ITEMS])
    return made


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = dict(*args, **kwargs)
    hidden = [name for name in values if str(name).startswith("_")]
    if hidden:
        raise TemplateError(f"a namespace cannot hold {hidden[0]!r}")
    return Namespace(values)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))
