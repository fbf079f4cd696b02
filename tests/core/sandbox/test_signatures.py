"""WIT text becomes typed signatures."""

from __future__ import annotations

import pytest

from pie_core.sandbox.signatures import WitError, our_interfaces, read_wit
from pie_core.sandbox.wit_types import (
    Enum,
    Flags,
    Function,
    Handle,
    ListOf,
    OptionOf,
    Primitive,
    Record,
    ResultOf,
    TupleOf,
    Variant,
    same_function,
    same_shape,
)

TEXT = """
package some:thing@2.1.0;

/* a block comment with interface words: func() */
interface shapes {
  use other.{token, id as number};
  record point { x: f32, y: f32, }
  variant answer { none, some(point), many(list<point>) }
  enum colour { red, light-blue }
  flags rights { read, write }
  type points = list<point>;
  draw: func(points: points, colour: colour, rights: rights) -> result<answer, string>;  // ends here
  resource canvas {
    constructor(size: tuple<u32, u32>);
    open: static func(name: string) -> option<canvas>;
    put: func(at: point, token: borrow<token>);
  }
  swap: func(mine: canvas) -> canvas;
}

interface other {
  type id = u64;
  resource token;
}
"""


def test_every_kind_of_type_is_read() -> None:
    shapes = read_wit([TEXT])["some:thing/shapes"]
    point = Record("point", (("x", Primitive("f32")), ("y", Primitive("f32"))))
    answer = Variant("answer", (("none", None), ("some", point), ("many", ListOf(point))))
    canvas, token = "some:thing/shapes.canvas", "some:thing/other.token"
    assert shapes.version == "2.1.0"
    assert shapes.types["number"] == Primitive("u64")
    assert shapes.functions == {
        "draw": Function(
            "draw",
            "draw",
            (
                ("points", ListOf(point)),
                ("colour", Enum("colour", ("red", "light-blue"))),
                ("rights", Flags("rights", ("read", "write"))),
            ),
            ResultOf(answer, Primitive("string")),
        ),
        "[constructor]canvas": Function(
            "[constructor]canvas",
            "[constructor]canvas",
            (("size", TupleOf((Primitive("u32"), Primitive("u32")))),),
            Handle(canvas, True),
        ),
        "[static]canvas.open": Function(
            "canvas.open",
            "[static]canvas.open",
            (("name", Primitive("string")),),
            OptionOf(Handle(canvas, True)),
        ),
        "[method]canvas.put": Function(
            "canvas.put",
            "[method]canvas.put",
            (("self", Handle(canvas, False)), ("at", point), ("token", Handle(token, False))),
            None,
        ),
        "swap": Function("swap", "swap", (("mine", Handle(canvas, True)),), Handle(canvas, True)),
    }


def test_every_file_of_the_host_api_is_read() -> None:
    ours = our_interfaces()
    assert set(ours["inferlet:api/script-runtime"].functions) == {"load", "run"}
    assert str(ours["inferlet:api/forward"].functions["step"]) == (
        "func(context: borrow<context>, token: u32, sampler: borrow<sampler>) "
        "-> result<u32, record {code: string, message: string}>"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("package a:b; interface c { f: func(x: nothing); }", "'nothing' before it is defined"),
        ("package a:b; interface c { use d.{e}; }", "a:b/d is used and defined nowhere"),
        ("package a:b; interface c { use d.{e}; } interface d { }", "uses 'e', which a:b/d does not define"),
        ("package a:b; interface c { f func(); }", "expected ':', saw 'func'"),
        ("package a:b; something c { }", "expected interface or world"),
    ],
)
def test_unreadable_text_is_refused_with_the_place(text: str, says: str) -> None:
    with pytest.raises(WitError, match=says):
        read_wit([text])


def test_names_do_not_count_when_signatures_are_compared_but_fields_do() -> None:
    def named(name: str, *fields: str) -> Record:
        return Record(name, tuple((field, Primitive("u8")) for field in fields))

    assert same_shape(ListOf(named("a", "x")), ListOf(named("b", "x")))
    assert not same_shape(named("a", "x"), named("a", "y"))
    assert same_shape(Handle("one", True), Handle("", True))
    assert not same_shape(Handle("one", True), Handle("one", False))
    assert same_function(
        Function("f", "f", (("x", Primitive("u8")),), None),
        Function("g", "g", (("y", Primitive("u8")),), None),
    )
    assert not same_function(Function("f", "f", (), None), Function("f", "f", (), Primitive("u8")))
