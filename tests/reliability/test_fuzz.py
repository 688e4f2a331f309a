"""Whatever stands in a recipe, `byway` reads it or says in one sentence what is wrong: no field lets a foreign exception through."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from byway.cli import main
from byway.core.fields import hints
from byway.errors import ConfigError
from byway.recipe.recipe import Recipe
from byway.recipe.sections import Base, Data, Engine, Train
from tests.reliability.table import World, recipe

STRINGS = [
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "x\udfff",
    "\udc80",
    "a" * 300,
    "ä" * 200,
    "./" + "a" * 300,
    "a/" * 3000,
    "/" * 5000,
    "~no-such-user/x",
    "~",
    ":",
    ".x:Y",
    "a:",
    ":Y",
    "a..b:Y",
    "os:path",
    "os.:x",
    "byway:LoRA",
    "json:JSONDecoder",
    "this_fails:X",
    "x y:Z",
    "ａ:ｂ",
    "..",
    ".",
    "/",
    "/dev/null",
    "/proc/self/mem",
    "-",
    "--help",
    "%s%n",
    "{",
    "{{",
    "{% for %}",
    "*",
    "(",
    "[",
    "\\",
    "re:(",
    "hub:",
    "hub:/",
    "hub:a/b/c",
    "http://127.0.0.1:1/x",
    "\u202e",
    "🙂",
    "NaN",
    "null",
    "true",
    "1e999",
    "\n",
    "\r\n",
    "'",
    '"',
    "file.txt/x",
    "loop",
]
OTHERS: list[Any] = [
    None,
    True,
    0,
    -1,
    10**30,
    -(10**400),
    1.5,
    float("inf"),
    float("nan"),
    -0.0,
    1e308,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    {"": {}},
    ["a", 1],
    [True],
    {"q_proj": None},
    {"q_proj": -1},
    {"x": 10**30},
    [10**20],
    [-(10**20)],
    [["a"]],
    {"a": {"b": {"c": []}}},
    [{}],
    ["x"] * 50,
]
SECTIONS = {"base": Base, "data": Data, "train": Train, "engine": Engine}


def keys() -> Iterator[tuple[str, str, str]]:
    """(section, method, key) of every key of a recipe."""
    from byway import methods

    yield from ((section, "", key) for section, cls in SECTIONS.items() for key in hints(cls))
    yield from (("method", name, key) for name in methods.names() for key in (*hints(methods.load(name)), "name", "unknown"))
    yield ("output", "", "")


KEYS = list(keys())


def put(world: World, section: str, method: str, key: str, value: Any) -> dict[str, Any]:
    if section == "output":
        return recipe(world.shared.base) | {"output": value}
    if section == "method":
        return recipe(world.shared.base) | {"method": {"name": method, key: value}}
    return recipe(world.shared.base, **{section: {key: value}})


@pytest.fixture
def prepared(world: World) -> World:
    """The rows, a link that leads to itself, and a module that cannot be imported."""
    world.texts()
    world.write("file.txt", "x")
    world.write("this_fails.py", "1 / 0")
    (world.root / "loop").symlink_to("loop")
    return world


def test_no_value_of_any_key_is_a_bug(
    prepared: World, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file, and from Python. What is accepted is prepared, up to the first step."""
    monkeypatch.syspath_prepend(prepared.root)
    draw = random.Random(seed)
    cases = [(draw.choice(KEYS), value) for value in (*STRINGS, *OTHERS) for _ in range(2)]
    cases += [(key, draw.choice(STRINGS)) for key in KEYS if key[0] != "method" or key[2] in ("targets", "name", "init")]
    before = sorted(prepared.root.rglob("*"))
    path = prepared.root / "recipe.yaml"
    for (section, method, key), value in cases:
        values = put(prepared, section, method, key, value)
        path.write_text(json.dumps(values), encoding="utf-8")  # JSON escapes surrogates; NaN and Infinity are strings in YAML
        code = main(["train", str(path), "--dry-run"])
        said = capsys.readouterr().err
        assert code in (0, 2), (section, method, key, value, said)
        assert code == 0 or sum(line.startswith("error:") for line in said.splitlines()) == 1, said
        try:
            Recipe.from_dict(values)
        except Exception as error:
            assert isinstance(error, ConfigError), (section, method, key, value, error)
    path.unlink()
    assert sorted(prepared.root.rglob("*")) == [entry for entry in before if entry.name != "recipe.yaml"]


@pytest.mark.parametrize(
    ("section", "value", "says"),
    [
        ({"output": "a" * 300}, "output", "300 bytes; file systems allow 255"),
        ({"output": "\ud800"}, "output", "U+D800, half of a character"),
        ({"data": {"train": "ä" * 200}}, "data.train", "400 bytes"),
        ({"data": {"train": ["x.jsonl", "\udc80"]}}, "data.train", "U+DC80"),
        ({"data": {"labels": ["a", "\udfff"]}}, "data.labels", "U+DFFF"),
        ({"base": {"model": "./" + "a" * 300}}, "base", "300 bytes"),
        ({"base": {"model": "~no-such-user/model"}}, "base", "home directory"),
        ({"engine": {"cache": "a/" * 3000}}, "engine.cache", "6,000 bytes"),
        ({"method": {"name": ":"}}, "method.name", "package.module:Class"),
        ({"method": {"name": ".x:Y"}}, "method.name", "package.module:Class"),
        ({"method": {"name": "this_fails:X"}}, "method.name", "ZeroDivisionError"),
        ({"data": {"task": ".x:Y"}}, "data.task", "import path"),
        ({"engine": {"levers": [".x:Y"]}}, ".x:Y", "package.module:Class"),
    ],
)
def test_what_no_system_can_store_or_import_is_named_with_its_key(
    prepared: World, section: dict[str, Any], value: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(prepared.root)
    prepared.write("recipe.yaml", json.dumps(recipe(prepared.shared.base, **section)))
    for command in (["train", "recipe.yaml"], ["doctor", "recipe.yaml"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert value in said and says in said
    assert not (prepared.root / "run").exists()


@pytest.mark.parametrize("escape", [r"\U00110000", r"\UFFFFFFFF", r"\U7FFFFFFF"])
def test_an_escape_beyond_unicode_is_an_error_with_its_place(world: World, escape: str, capsys: pytest.CaptureFixture[str]) -> None:
    world.write("recipe.yaml", f'method: {{name: lora}}\ndata: {{train: x.jsonl}}\noutput: "a{escape}"\n')
    assert main(["train", "recipe.yaml"]) == 2
    assert "recipe.yaml:3:" in (said := capsys.readouterr().err) and "beyond U+10FFFF" in said
    assert main(["train", "recipe.yaml", f'output="{escape}"']) == 2


@pytest.mark.parametrize("command", ["train", "data", "doctor", "generate", "eval", "inspect", "merge"])
def test_a_name_that_is_too_long_is_an_error_of_every_command(world: World, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"generate": ["-p", "x"], "merge": ["-o", "merged"]}.get(command, [])
    for name in ("a" * 300, "a/" * 3000):
        assert main([command, name, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1 and "bug" not in said


def test_a_recipe_of_random_bytes_is_an_error(world: World, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Pieces of YAML in any order, and a good recipe with bytes changed."""
    draw = random.Random(seed)
    good = json.dumps(recipe(world.shared.base)).encode()
    pieces = rb"a: |- |[|]|{|}|  |&x |*x|!!|!<|'|\"|\|\U|FFFFFFFF|%YAML |---|...|#|?|:|>|<<: *x|0x|1e9|@|`".split(b"|")
    pieces += [b"|", b"\n", b"\t", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80"]
    for turn in range(300):
        data = bytearray(good)
        if turn % 2:
            data = bytearray(b"".join(draw.choices(pieces, k=draw.randint(1, 30))))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        world.write("recipe.yaml", bytes(data))
        code = main(["data", "recipe.yaml", "output=run", "data.train=missing.jsonl"])
        assert code == 2, (bytes(data), capsys.readouterr().err)
        capsys.readouterr()
