"""Templates are written as transformers writes them, and none takes more time, memory or text than it may."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from byway.data.jinja.renderer import Refused, Renderer, Request, Written
from byway.data.jinja.worker import CPU_START
from byway.errors import ConfigError
from tests.data.conftest import MARKED, SMOL, THINKING, TOOLS, assistant, user

Build = Callable[..., PreTrainedTokenizerFast]
TALK = [user("How are “you”?"), assistant("Fine 🙂"), user("<b> & 'c'"), {**assistant("Paris."), "n": 3, "f": 0.5}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"ä": {"type": "integer"}}}}}


def write(renderer: Renderer, messages: Any, jobs: Any, tools: Any = None, variables: Any = None) -> list[Written]:
    (found,) = renderer.write([Request(messages, jobs, tools, variables or {})])
    if isinstance(found, Refused):
        raise found
    return found


UNUSUAL = (
    "{%- set ns = namespace(n=0, d={'a': [1, 2]}) %}\n   {% for m in messages %}\n{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% if m.role == 'tool' %}{% continue %}{% endif %}  {{- m.content | trim | upper }} {{ m | tojson(indent=2) }}"
    "{% set ns.n = ns.n + 1 %}"
    "{% endfor %}\n\n{{ ns.n }}{{ dict(a=1) | items | list }}{{ dict.fromkeys(['x'], 2) }}{{ strftime_now('%Y') }}{% macro f(x) %}<{{ x }}>"
    "{% endmacro %}{{ f(ns.d['a'] | join('-')) }}{{ tools | length if tools else none }}{{ '%s %5.2f' % ('é', 2) }}{{ documents }}"
    "{{ bos_token }}{{ given['k'] | default('?') }}{{ (messages[-1].n or 7) // 2 }}{{ messages[-1].f or '' }}"
    "{{ messages[0].missing is defined }}"
)


@pytest.mark.parametrize("template", [SMOL, MARKED, THINKING, TOOLS, UNUSUAL], ids=["smol", "marked", "thinking", "tools", "unusual"])
def test_texts_and_marks_are_those_of_transformers(chatml: Build, template: str) -> None:
    tokenizer = chatml(template)
    variables = {**tokenizer.special_tokens_map, "given": {"k": ["é", None, True, 1.5, -0.0]}}
    renderer = Renderer(template, "a template")
    for tools in (None, [TOOL]):
        jobs = [(count, prompt) for count in range(1, 5) for prompt in (False, True)]
        for (count, prompt), written in zip(jobs, write(renderer, TALK, jobs, tools, variables), strict=True):
            options = {"tools": tools, "add_generation_prompt": prompt, "given": variables["given"]}
            assert written.text == tokenizer.apply_chat_template(TALK[:count], tokenize=False, **options)
        if template == MARKED:
            texts, marks = render_jinja_template([TALK], tools, None, template, return_assistant_tokens_mask=True, **variables)
            (written,) = write(renderer, TALK, [(4, False)], tools, variables)
            assert [written.text] == texts and list(written.marks) == [tuple(mark) for mark in marks[0]]


def test_a_template_says_itself_why_it_refuses() -> None:
    renderer = Renderer(
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0]['content'] }}", "a template"
    )
    with pytest.raises(Refused, match="one at a time"):
        write(renderer, TALK, [(2, False)])
    assert write(renderer, TALK, [(1, False)])[0].text == TALK[0]["content"]
    for unsafe in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ namespace(_a=1) }}", "{{ cycler.__init__.__globals__ }}"):
        with pytest.raises(Refused):
            write(Renderer(unsafe, "a template"), TALK, [(1, False)])
    with pytest.raises(ConfigError, match=r"a template is not a valid Jinja template: line 2: "):
        Renderer("{{ a }}\n{% if %}", "a template")
    with pytest.raises(ConfigError, match="not a valid Jinja template"):
        Renderer("{% include 'etc' ", "a template")


LARGE = {
    "product": "{{ 'a' * 10**9 }}",
    "product of a list": "{{ (range(99999) | list * 10**5) | length }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "added": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "unrolled": "{% set x = 'abcdefgh' * 1000 %}" + "{% set x = [x, x] | join %}" * 40 + "{{ x | length }}",
    "replaced": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) | length }}",
    "wide format": "{{ '%1000000000d' % 1 }}",
    "wide str.format": "{{ '{:>1000000000}'.format(1) }}",
    "nested width": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "centered": "{{ ('a' | center(10**9)) | length }}",
    "filled": "{{ 'a'.ljust(10**9) | length }}{{ 'a'.zfill(10**9) | length }}",
    "indented": "{{ ('a\n' * 10**4) | indent(10**6) | length }}",
    "indented JSON": "{{ messages | tojson(indent=10**9) }}",
    "batched": "{{ [1] | batch(10**9, 0) | list | length }}",
    "bytes": "{{ (5).to_bytes(10**9, 'big') | length }}",
    "nested calls": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "much text": "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "in a block": "{% set x %}{% for i in range(99999) %}{{ 'x' * 10**5 }}{% endfor %}{% endset %}{{ x | length }}",
    "only in long conversations": "{% if messages | length > 2 %}{{ 'a' * 10**9 }}{% endif %}",
}


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_no_template_takes_much_memory_or_writes_much(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"^the chat template of x exceeds (192 MB of memory|the depth|\d+,\d+ characters|what)"):
        write(Renderer(template, "the chat template of x"), TALK, [(1, False), (4, True)])
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 500_000 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 500_000


def test_no_template_takes_long_in_one_text_or_in_many() -> None:
    slow = "{% for i in range(9999) %}{% for j in range(9) %}{% endfor %}{% endfor %}a"
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    renderer = Renderer(slow, "the chat template of x")
    with pytest.raises(ConfigError, match="the chat template of x exceeds the time"):
        for _ in range(3000):
            write(renderer, TALK, [(4, False)])
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 3 * CPU_START


def test_ordinary_templates_are_written_quickly_and_without_end() -> None:
    renderer = Renderer(SMOL, "a template")
    jobs = [(count, count % 2 == 1) for count in range(1, 5)]
    began = time.process_time()
    assert len(renderer.write(Request(TALK, jobs) for _ in range(2000))) == 2000
    assert time.process_time() - began < 4  # of this process: 30 µs for a conversation
    long = [user("word " * 2000), assistant("fine " * 2000)] * 50
    assert len(write(renderer, long, [(count, False) for count in range(1, 100)])[-1].text) > 9 * 10**5


def test_the_process_ends_with_its_owner() -> None:
    renderer = Renderer(SMOL, "a template")
    process = renderer._process
    del renderer
    gc.collect()
    assert process.returncode is not None
