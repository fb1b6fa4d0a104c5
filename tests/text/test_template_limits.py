"""A hostile template costs a bounded time and memory, and the next one is not affected."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

from qwen_jax.errors import UserError
from qwen_jax.text.template_renderer import _ENVIRONMENT, WORKER, TemplateRenderer

CONTEXT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}] * 50}
BIG = 10**10
MODULE = "qwen_jax.text.template_renderer"


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(seconds=1.5, max_bytes=100_000, memory_bytes=256 << 20)
    yield renderer
    renderer.close()


ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "nested messages": "{% for a in messages %}" * 12 + "{% endfor %}" * 12,
    "huge power": "{% set x = 9 ** (9 ** 8) %}",
    "slow join": "{% for i in range(99999) %}{% set x = range(99999) | list | length %}"
    "{% endfor %}",
    "lipsum": "{% set x = lipsum(n=99999999, min=1, max=2) %}",
}
GREEDY = {
    "repeat": f"{{{{ 'a' * {BIG} }}}}",
    "list": f"{{{{ [1] * {BIG} }}}}",
    "center": f"{{{{ 'a' | center({BIG}) }}}}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "format method": f"{{{{ '{{:>{BIG}}}'.format(1) }}}}",
    "ljust": f"{{{{ 'a'.ljust({BIG}) }}}}",
    "indent": f"{{{{ 'a\nb' | indent({BIG}) }}}}",
    "replace": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "tojson": f"{{{{ [1] | tojson(indent={BIG}) }}}}",
}
LONG = {
    "one piece": "{{ 'a' * 100001 }}",
    "many pieces": "{% for i in range(99999) %}{{ i }}{% endfor %}",
    "wide characters": "{{ '\u4f60' * 33334 }}",
}
DEEP = {
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "parentheses": "{{" + "(" * 20000 + ")" * 20000 + "}}",
    "blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "additions": "{{ " + "1 + " * 20000 + "1 }}",
}


def _refused(renderer: TemplateRenderer, template: str, within: float) -> str:
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        renderer.render(template, CONTEXT, "x.gguf")
    assert time.perf_counter() - start < within
    assert renderer.render("{{ messages | length }}", CONTEXT, "x.gguf") == "50"
    message = str(caught.value)
    assert message.startswith("x.gguf: its chat template ") and "\n" not in message
    return message


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_endless_templates_are_stopped(template: str) -> None:
    """In less time than others have, for they use all of it."""
    renderer = TemplateRenderer(seconds=0.6, max_bytes=100_000, memory_bytes=256 << 20)
    try:
        message = _refused(renderer, template, within=5)
    finally:
        renderer.close()
    assert "took longer than 0.6 s and was stopped" in message


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS")
@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_greedy_templates_are_stopped(template: str, renderer: TemplateRenderer) -> None:
    assert "needed too much memory" in _refused(renderer, template, within=5)


@pytest.mark.parametrize("template", LONG.values(), ids=LONG)
def test_long_output_is_stopped(template: str, renderer: TemplateRenderer) -> None:
    message = _refused(renderer, template, within=5)
    assert "wrote more than 100000 bytes and was stopped" in message


@pytest.mark.parametrize("template", DEEP.values(), ids=DEEP)
def test_deep_templates_are_refused(template: str, renderer: TemplateRenderer) -> None:
    _refused(renderer, template, within=5)


def test_output_up_to_the_limit(renderer: TemplateRenderer) -> None:
    assert renderer.render("{{ '\\0' * 100000 }}", {}, "x") == "\0" * 100_000


@pytest.mark.parametrize("text", ["a" * (20 << 20), "\x01\u4f60\U0001f999" * (1 << 20)])
def test_limits_follow_the_conversation(text: str, renderer: TemplateRenderer) -> None:
    """20 MiB and 8 MiB, where a short conversation may become 100,000 bytes."""
    context = {"messages": [{"role": "user", "content": text}]}
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    assert renderer.render(template, context, "x") == f"<|im_start|>user\n{text}"
    with pytest.raises(UserError, match=r"wrote more than \d+ bytes and was stopped"):
        renderer.render(template * 40, context, "x")
    assert renderer.render("{{ messages | length }}", CONTEXT, "x") == "50"
    with pytest.raises(UserError, match="wrote more than 100000 bytes"):  # the old limit again
        renderer.render("{{ 'a' * 100001 }}", CONTEXT, "x")


def test_start_and_render_are_quick(renderer: TemplateRenderer) -> None:
    """0.1 s for the first chat and 0.2 ms for later ones; the bounds allow for a busy machine."""
    renderer.close()
    start = time.perf_counter()
    renderer.render("hi", {}, "x")
    assert time.perf_counter() - start < 1.0
    start = time.perf_counter()
    for _ in range(100):
        renderer.render("hi", {}, "x")
    assert time.perf_counter() - start < 1.0


def test_threads_take_turns(renderer: TemplateRenderer) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            answers[number] = renderer.render("{{ n }}", {"n": number}, "x")
            assert answers[number] == str(number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: str(n) for n in range(4)}


def test_a_dead_child_is_replaced(renderer: TemplateRenderer) -> None:
    renderer.render("hi", {}, "x")
    child = renderer._child
    assert child is not None
    child.kill()
    child.wait()
    with pytest.raises(UserError, match="crashed"):
        renderer.render("hi", {}, "x")
    assert renderer.render("hi", {}, "x") == "hi"


def test_a_child_that_cannot_start(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody's template is to blame, and what is has a name."""
    renderer.close()
    nothing, silent = tmp_path / "nothing_worker.py", tmp_path / "silent_worker.py"
    nothing.write_text("import no_such_module")
    silent.write_text("raise SystemExit(3)")
    for executable, worker, why in (
        ("/nowhere/python", WORKER, "No such file or directory"),
        (sys.executable, "/nowhere/worker.py", "No such file or directory"),
        (sys.executable, nothing, "ModuleNotFoundError: No module named 'no_such_module'"),
        (sys.executable, silent, "it ended with the code 3"),
    ):
        monkeypatch.setattr(sys, "executable", executable)
        monkeypatch.setattr(f"{MODULE}.WORKER", worker)
        with pytest.raises(UserError, match=rf"did not start \(.*{why}\); see what `.*worker\.py"):
            renderer.render("hi", {}, "x")
    monkeypatch.setattr(f"{MODULE}.START_SECONDS", 0.1)
    silent.write_text("import time; time.sleep(60)")
    with pytest.raises(UserError, match=r"did not start \(it took longer than 0\.1 s\)"):
        renderer.render("hi", {}, "x")
    monkeypatch.undo()
    assert renderer.render("hi", {}, "x") == "hi"


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("raise KeyError('x')", r"ended with the code 1 \(KeyError: 'x'\), which is no fault of x"),
        ("raise SystemExit(3)", r"ended with the code 3 \(\), which is no fault of x"),
        ("raise MemoryError", "x: its chat template needed too much memory or crashed"),
        ("import os; os.abort()", "x: its chat template needed too much memory or crashed"),
    ],
)
def test_a_child_that_fails_by_itself(
    fails: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own mistake is told from what a template has done to it."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"print('{{\"ready\": 1}}', flush=True)\ninput()\n{fails}")
    monkeypatch.setattr(f"{MODULE}.WORKER", worker)
    renderer = TemplateRenderer(seconds=30)
    with pytest.raises(UserError, match=said):
        renderer.render("hi", {}, "x")
    assert renderer._child is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_knows_no_secrets(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("TZ", "UTC")
    renderer.close()
    renderer.render("hi", {}, "x")
    child = renderer._child
    assert child is not None
    names = {
        entry.partition("=")[0]
        for entry in Path(f"/proc/{child.pid}/environ").read_text().split("\0")
        if entry
    }
    assert names <= set(_ENVIRONMENT) and "TZ" in names
    # Its three streams, and no file of this process.
    assert {path.name for path in Path(f"/proc/{child.pid}/fd").iterdir()} <= {"0", "1", "2"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS")
def test_a_reply_that_fits_no_memory(renderer: TemplateRenderer) -> None:
    """Outside of the template's own code, on the way back."""
    small = TemplateRenderer(seconds=10, max_bytes=200 << 20, memory_bytes=128 << 20)
    with pytest.raises(UserError, match="x: its chat template needed too much memory"):
        small.render("{{ '\x01' * (60 * 1024 * 1024) }}", {}, "x")
    small.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a terminal are a Unix thing")
def test_the_child_leaves_ctrl_c_to_the_parent(renderer: TemplateRenderer) -> None:
    renderer.render("hi", {}, "x")
    child = renderer._child
    assert child is not None
    os.kill(child.pid, signal.SIGINT)
    assert renderer.render("hi", {}, "x") == "hi"
    assert renderer._child is child


def test_the_child_ends_with_the_program() -> None:
    code = (
        "from qwen_jax.text import chat\n"
        "chat.render_chat(None, [{'role': 'user', 'content': 'x'}])\n"
        "print(chat._renderer()._child.pid)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.stdout), 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
def test_the_child_limits_its_own_processor_time() -> None:
    """For the case that its parent is killed and cannot stop it."""
    request = b'{"template": "' + ENDLESS["nested ranges"].encode() + b'", "context": {}}\n'
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-P", str(WORKER), "0.1", "1000", str(256 << 20)],
        input=request,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == -signal.SIGXCPU
    assert result.stdout == b'{"ready": true}\n'
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("name", sorted(jinja2.sandbox.ImmutableSandboxedEnvironment().filters))
def test_filters_work_inside_the_limits(name: str, renderer: TemplateRenderer) -> None:
    """Nothing that jinja2 imports late is missing where no file can be opened."""
    if name == "random":
        return
    arguments = {"attr": "('x')", "batch": "(2)", "default": "(1)", "map": "('upper')"}
    arguments |= {"groupby": "(0)", "replace": "('a', 'b')", "slice": "(2)", "xmlattr": "()"}
    template = "{{ VALUE | NAMEARGS | list }}".replace("NAME", name)
    template = template.replace("ARGS", arguments.get(name, ""))
    inside: list[str] = []
    outside: list[str] = []
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    for value in ("'b a\\u00e9 http://x.y'", "['b', 'a', 'b']", "{'b': 1}", "3.5", "none"):
        source = template.replace("VALUE", value)
        try:
            outside.append(environment.from_string(source).render())
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError) as error:
            outside.append(type(error).__name__)
        try:
            inside.append(renderer.render(source, {}, "x"))
        except UserError as error:
            inside.append(str(error).partition("failed with ")[2].partition(":")[0])
    if name != "tojson":  # ours leaves < and & alone
        assert inside == outside
