"""Writes the parts of the docs that repeat what the code says: `scripts/docs`, or `scripts/docs --check` to compare.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`, a whole file between
`<!-- quoted: PATH -->` and `<!-- end -->`; everything else is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from pie_core import errors, hookspecs
from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.models.plan import FORMATS, GIB, GPU_COUNTS, ModelPlan, plan_model
from pie_core.plugins import GROUP, PluginRegistry, load_plugins
from pie_core.server import messages, status
from pie_core.server.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- (generated|quoted): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PACKAGES = ("pie_core", "plugins")

# Folders in the order in which a request passes them; the others follow by name.
FLOW = (
    *("cli", "server", "app", "config", "guests", "sandbox", "wit", "host_api", "text"),
    *("engine", "scheduler", "kv_pages", "contracts", "testing"),
    *("drivers", "models", "media"),
)
WITHOUT_INIT = {"wit": "The host API as guests see it; each file has its twin in host_api/"}
LONGEST = 110  # characters of a sentence in the tree; a longer one is cut at its first colon or semicolon


def tree() -> str:
    """Every module and WIT file with the first sentence of its text."""
    lines = [line for package in PACKAGES for line in _folder(ROOT / package, 0)]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    sentence = WITHOUT_INIT.get(folder.name) or _sentence(folder / "__init__.py")
    yield _line(f"{folder.name}/", depth, sentence)
    for path in sorted(folder.iterdir(), key=_place):
        if path.is_dir() and _holds_sources(path):
            yield from _folder(path, depth + 1)
        elif path.suffix in {".py", ".wit"} and path.name != "__init__.py":
            yield _line(path.name, depth + 1, _sentence(path))


def _place(path: Path) -> tuple[bool, int, str]:
    """Files first, then folders along the flow."""
    return path.is_dir(), FLOW.index(path.name) if path.name in FLOW else len(FLOW), path.name


def _holds_sources(folder: Path) -> bool:
    return any(folder.rglob("*.py")) or any(folder.glob("*.wit"))


def _line(name: str, depth: int, sentence: str) -> str:
    return f"{'  ' * depth}{name:<{max(28 - 2 * depth, len(name) + 2)}}{sentence}".rstrip()


def _sentence(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text()
    if path.suffix == ".wit":
        found = re.search(r"^///? (.*)$", text, re.MULTILINE)
        return _first_sentence(found.group(1)) if found else ""
    return _first_sentence(ast.get_docstring(ast.parse(text, str(path))) or "")


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[.!?]) ", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".:")
    return sentence if len(sentence) <= LONGEST else re.split(r"[:;] ", sentence)[0]


def hooks() -> str:
    """Each hook with its exact signature and its docstring."""
    specs = [value for name, value in vars(hookspecs).items() if name.startswith("pie_")]
    return "\n".join(
        f"### `{spec.__name__}`\n\n```python\n{_signature(spec)}\n```\n\n{inspect.getdoc(spec)}\n"
        for spec in specs
    )


def _signature(function: Callable[..., object]) -> str:
    return f"def {function.__name__}{inspect.signature(function)}".replace("'", "")


def error_tree() -> str:
    """The drawing in errors.py, and the code that each class shows to guests and clients."""
    drawing = inspect.getdoc(errors) or ""
    body = "\n".join(line for line in drawing.splitlines() if re.match(r"\s{4}\S|\s{4}[│├└ ]", line))
    codes = "".join(f"| `{kind.__name__}` | `{kind.code}` |\n" for kind in _descendants(errors.PieError))
    return f"```text\n{inspect.cleandoc(body)}\n```\n\n| class | code |\n| --- | --- |\n{codes}"


def drivers() -> str:
    """Each built-in driver with a table of its options."""
    return "\n".join(
        f"### `{name}`\n\n{driver.summary}\n\n| option | type | default | meaning |\n| --- | --- | --- | --- |\n"
        + "".join(_option_row(option) for option in fields(driver.options))
        for name, driver in sorted(_built_in().drivers.items())
    )


def _option_row(option: Field[Any]) -> str:
    kind = str(option.type).replace("|", "\\|")
    return f"| `{option.name}` | `{kind}` | `{option.default!r}` | {option.metadata['help']} |\n"


def architectures() -> str:
    rows = "".join(_architecture_row(each) for _, each in sorted(_built_in().architectures.items()))
    return f"| name | `model_type` | GGUF | models |\n| --- | --- | --- | --- |\n{rows}"


def _architecture_row(each: ArchitectureDeclaration) -> str:
    gguf = ", ".join(each.gguf_architectures) or "none"
    return f"| `{each.name}` | {', '.join(each.model_types)} | {gguf} | {each.summary} |\n"


def architecture_files() -> str:
    """The file of each architecture with its length, and whatever else only that architecture uses."""
    files = dict(_architecture_files())
    reached = {path: _reached(path) for path in files}
    rows = []
    for path, names in files.items():
        others = set().union(*(each for other, each in reached.items() if other != path))
        own = sorted(reached[path] - others - {path})
        near = [each for each in own if each.stem.startswith(path.stem)]
        layers = ", ".join(f"{each.stem} {_length(each)}" for each in own if each not in near)
        total = _length(path) + sum(map(_length, near))
        listed = ", ".join(f"`{name}`" for name in names)
        place = path.relative_to(ROOT)
        rows.append(f"| {listed} | `{place}` | {_length(path)} | {total} | {layers or 'none'} |\n")
    head = "| architecture | file | lines | with configuration and build | layers that no other uses yet |\n"
    return head + "| --- | --- | --- | --- | --- |\n" + "".join(rows)


def _architecture_files() -> Iterator[tuple[Path, list[str]]]:
    for plugin in sorted(_built_in().plugins, key=lambda each: each.name):
        names = [
            each.removeprefix("architecture ") for each in plugin.provides if each.startswith("architecture ")
        ]
        if names:
            yield ROOT.joinpath("plugins", *plugin.module.split(".")[1:]).with_suffix(".py"), names


def _length(path: Path) -> int:
    return len(path.read_text().splitlines())


def _reached(path: Path) -> set[Path]:
    """The modules of plugins/models that a file needs, itself included."""
    found, waiting = {path}, [path]
    while waiting:
        new = set(_imported(waiting.pop())) - found
        found |= new
        waiting += new
    return found


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pie_plugins.models."):
            module = ROOT.joinpath("plugins", *(node.module or "").split(".")[1:]).with_suffix(".py")
            yield from [module] if module.is_file() else []


def checkpoints() -> str:
    """What each configuration in docs/checkpoints needs of memory."""
    head = [
        "checkpoint",
        "architecture",
        "parameters",
        *(f"{form} GiB" for form in FORMATS),
        "cache of a token",
    ]
    head += [f"{count} x H200" for count in GPU_COUNTS]
    rows = [head, ["---"] * len(head)]
    for file in sorted((ROOT / "docs/checkpoints").glob("*.json")):
        rows.append([file.stem, *_planned(plan_model(file, _built_in().architectures))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _planned(plan: ModelPlan) -> Iterator[str]:
    yield f"`{plan.architecture}`"
    yield f"{plan.num_parameters / 1e9:.1f} B"
    for form in FORMATS:
        yield f"{plan.weight_bytes[form] / GIB:.0f}" if plan.weight_bytes[form] > GIB else "< 1"
    state = f" + {plan.bytes_per_context / 2**20:.0f} MiB a context" if plan.bytes_per_context else ""
    yield f"{plan.bytes_per_token / 1024:.0f} KiB{state}"
    for count in GPU_COUNTS:
        yield _best_fit(plan, count)


def _best_fit(plan: ModelPlan, count: int) -> str:
    """The widest format that fits, and how many tokens beside it."""
    for form in FORMATS:
        tokens = plan.tokens_that_fit(form, count)
        if tokens is not None:
            return f"{form}, {tokens / 1e6:.1f} M" if tokens >= 1e5 else f"{form}, {tokens / 1e3:.0f} K"
    return "no"


@cache
def _built_in() -> PluginRegistry:
    registry = load_plugins(
        point for point in entry_points(group=GROUP) if point.value.startswith("pie_plugins.")
    )
    assert not registry.broken, registry.broken
    return registry


def _descendants(kind: type[errors.PieError]) -> Iterator[type[errors.PieError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _descendants(child)


def requests() -> str:
    """Every message of a client, with its fields."""
    return "\n".join(_message(kind, _needs(kind)) for kind in messages.REQUESTS)


def replies() -> str:
    """Every message of a server, with its fields."""
    return "\n".join(_message(kind, "") for kind in messages.REPLIES)


def status_parts() -> str:
    """Every object of a server's status, with its fields and what the code says of them."""
    return "\n".join(_part(kind) for kind in status.PARTS)


def _part(kind: type[msgspec.Struct]) -> str:
    comments = _comments(kind)
    rows = "".join(
        f"| `{field.name}` | {_wire_type(field.type)} | {comments.get(field.name, '')} |\n"
        for field in msgspec.structs.fields(kind)
    )
    head = f"#### `{kind.__name__}`\n\n{inspect.getdoc(kind)}\n\n"
    return f"{head}| field | type | meaning |\n| --- | --- | --- |\n{rows}"


def _comments(kind: type[msgspec.Struct]) -> dict[str, str]:
    """What stands behind a field in the source."""
    found = re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(kind), re.MULTILINE)
    return dict(found)


def metrics() -> str:
    """Every metric of /metrics that is ours."""
    rows = "".join(
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | {each.help} |\n"
        for each in sorted(Metrics().described(), key=lambda each: each.name)
    )
    return f"| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n{rows}"


def _needs(kind: type[messages.Request]) -> str:
    return "Needs no login." if kind.scope is None else f"Scope `{kind.scope}`."


def _message(kind: type[messages.Request] | type[messages.Reply], needs: str) -> str:
    rows = "".join(_field_row(kind, field) for field in msgspec.structs.fields(kind))
    text = f"{inspect.getdoc(kind)}\n\n{needs}".strip()
    return f"### `{messages.wire_name(kind)}`\n\n{text}\n\n| field | type | default |\n| --- | --- | --- |\n{rows}"


def _field_row(kind: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> str:
    default = "required" if field.required else f"`{field.default!r}`"
    return f"| `{field.name}` | {_wire_type(field.type)} | {default} |\n"


def _wire_type(hint: Any) -> str:
    """In words of MessagePack, with the bounds that are enforced."""
    if get_origin(hint) is Annotated:
        bare, *extras = get_args(hint)
        bounds = [_bounds(extra) for extra in extras if isinstance(extra, msgspec.Meta)]
        return f"{_wire_type(bare)}{''.join(bounds)}"
    if get_origin(hint) in (list, tuple):
        return f"array of {_wire_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"object of {_wire_type(get_args(hint)[1])}"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"`{hint.__name__}`"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_wire_type(each) for each in get_args(hint))
    words = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "boolean",
        bytes: "binary",
        type(None): "nil",
    }
    return words[hint]


def _bounds(meta: msgspec.Meta) -> str:
    numbers = _limits(meta, {"ge": "from", "le": "to"})
    lengths = _limits(meta, {"min_length": "at least", "max_length": "at most"})
    found = [
        *([" ".join(numbers)] if numbers else []),
        *([f"{' and '.join(lengths)} long"] if lengths else []),
        *([f"that matches `{meta.pattern}`"] if meta.pattern is not None else []),
    ]
    return f" ({', '.join(found)})" if found else ""


def _limits(meta: msgspec.Meta, words: Mapping[str, str]) -> list[str]:
    return [f"{word} {limit}" for name, word in words.items() if (limit := getattr(meta, name)) is not None]


GENERATORS: dict[str, Callable[[], str]] = {
    "tree": tree,
    "hooks": hooks,
    "errors": error_tree,
    "drivers": drivers,
    "architectures": architectures,
    "architecture-files": architecture_files,
    "checkpoints": checkpoints,
    "requests": requests,
    "replies": replies,
    "status": status_parts,
    "metrics": metrics,
}


def generated(text: str) -> str:
    """The page with each generated part as the code has it now."""
    return PART.sub(lambda part: part.group(1) + _content(part.group(2), part.group(3)) + part.group(4), text)


def _content(kind: str, name: str) -> str:
    return GENERATORS[name]() if kind == "generated" else f"```python\n{(ROOT / name).read_text()}```\n"


def main() -> int:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    stale = [page for page in pages if generated(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)} does not say what the code says")
        if "--check" not in sys.argv:
            page.write_text(generated(page.read_text()))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
