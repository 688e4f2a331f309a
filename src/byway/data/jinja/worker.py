"""The process that renders one chat template. It is run as a script: it imports the standard library and Jinja only.

Requests and replies are JSON, each after its length in four bytes. The first request is the template, the others are
conversations. The environment is that of transformers (``apply_chat_template``), so the text is the same.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows has no limits; the parent's timeout and the limit of the output remain
    resource = None

MEMORY = 192 * 2**20
"""Bytes of address space, beside eight times the request and four times for each text of it."""
CPU_START, CPU_JOB, CPU_BYTE = 1.0, 0.005, 1e-6
"""Seconds of processor time in all: at the start, for each text, and for each byte of a request."""
OUTPUT = 2**13
"""Characters of a text beside the template's own and sixteen times the request."""


class Marks(jinja2.ext.Extension):
    """The tag ``{% generation %}``, which marks what the assistant writes."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType] - Jinja only looks names up in it

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(tracked=self.tracked)
        self.blocks: list[str] | None = None
        self.found: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = caller()
        if self.blocks is not None:
            start = sum(map(len, self.blocks))
            self.found.append((start, start + len(text)))
        return text

    @contextmanager
    def tracked(self, blocks: list[str]) -> Iterator[list[tuple[int, int]]]:
        """Collect the marks of a text whose blocks are appended to `blocks` as they are written."""
        self.blocks, self.found = blocks, []
        try:
            yield self.found
        finally:
            self.blocks = None


class Dict:
    """The global ``dict``, without what the class itself would give access to."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """The global ``namespace``, without private names."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *rest = args  # as in Jinja's own, so that a variable may be called self
        values = dict(*rest, **named)
        for name in values:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: Any, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the private name {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """Return the environment in which transformers renders chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def literals(env: jinja2.Environment, source: str) -> list[str]:
    """Return the texts that are written in the template itself: outside of tags, and as constants inside."""
    tree = env.parse(source)
    found = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    return found + [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]


def rendered(template: jinja2.Template, request: dict[str, Any], count: int, prompt: bool, limit: int) -> dict[str, Any]:
    """Return the text of the first `count` messages with its marks, or why there is none."""
    variables = {"documents": None, **request["variables"]}
    blocks: list[str] = []
    size = 0
    try:
        with template.environment.tracked(blocks) as marks:  # type: ignore[attr-defined]
            for block in template.generate(
                messages=request["messages"][:count], tools=request["tools"], add_generation_prompt=prompt, **variables
            ):
                size += len(block)
                if size > limit:
                    return {"exceeded": f"{limit:,} characters of text"}
                blocks.append(block)
        return {"text": "".join(blocks), "marks": marks}
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a template is foreign code and may raise anything
        return {"refused": f"{error}"[:400] or type(error).__name__}


def answer(template: jinja2.Template, request: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """Return one result for each job of the request, up to the first that writes more than `limit` characters."""
    results: list[dict[str, Any]] = []
    for count, prompt in request["jobs"]:
        results.append(rendered(template, request, count, prompt, limit))
        if "exceeded" in results[-1]:
            break
    return results


class Limits:
    """The limits of this process, which grow with the work that is asked for."""

    def __init__(self) -> None:
        self.seconds = CPU_START

    def allow(self, size: int, jobs: int) -> None:
        """Set the limits for a request of `size` bytes."""
        self.seconds += CPU_JOB * jobs + CPU_BYTE * size
        if resource is None:
            return
        wanted = ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, int(self.seconds)), (resource.RLIMIT_AS, MEMORY + (8 + 4 * jobs) * size))
        for kind, limit in wanted:
            with suppress(OSError, ValueError):  # macOS does not limit address space
                resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


def read(stream: BinaryIO) -> bytes | None:
    """Return the next message; None at the end."""
    head = stream.read(4)
    return stream.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def write(stream: BinaryIO, value: Any) -> None:
    """Write one message."""
    data = json.dumps(value).encode()
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    limits = Limits()
    template: jinja2.Template | None = None
    output = OUTPUT
    while (data := read(source)) is not None:
        request = json.loads(data)
        limits.allow(len(data), len(request.get("jobs", ())))
        try:
            if template is None:
                env = environment()
                reply: Any = {"literals": literals(env, request["template"])}
                template = env.from_string(request["template"])
                output += len(request["template"])
            else:
                reply = answer(template, request, output + 16 * len(data))
            write(sink, reply)
        except MemoryError:
            write(sink, {"exceeded": f"{MEMORY // 2**20} MB of memory"})
        except RecursionError:
            write(sink, {"exceeded": "the depth of nested calls"})
        except jinja2.exceptions.TemplateError as error:  # the template itself: a syntax error
            line = f"line {error.lineno}: " if isinstance(error, jinja2.exceptions.TemplateSyntaxError) else ""
            write(sink, {"invalid": f"{line}{error.message or error}"})


if __name__ == "__main__":
    main()
