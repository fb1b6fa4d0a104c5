"""Prompt files: what is wrong is known before anything is written; answers equal those alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen_jax import api, prompts, settings
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from tests.cli.conftest import Run, answers_in

FILES = {
    b"": "holds no prompts",
    b"\n \r\n\n": "holds no prompts",
    b'{"prompt": "a"}\n{"prompt": \n': "line 2: it is not JSON (Expecting value at column 12)",
    b'{"prompt": "a"}\n\xff\n': "line 2 is not UTF-8 at byte 0",
    b"[1]\n": "line 1: it is [1], but it must be a JSON object",
    b'{"id": 3}\n': "line 1 has neither 'prompt' nor 'messages'; give one of",
    b'{"prompt": "a", "messages": []}\n': "line 1 has both 'prompt' and 'messages'; drop one",
    b'{"prompt": "a", "temprature": 1}\n': "field 'temprature'; did you mean 'temperature'?",
    b'{"prompt": "a", "temp": 1}\n': "field 'temp'; did you mean 'temperature'?",
    b'{"prompt": "a", "top-k": 1}\n': "field 'top-k'; did you mean 'top_k'?",
    b'{"prompt": "a", "message": 1}\n': "field 'message'; did you mean 'messages'?",
    b'{"prompt": "a", "model": "b"}\n': "field 'model', which its answer has, too; call it otherw",
    b'{"prompt": "a", "text": 1}\n': "line 1 has the field 'text', which its answer has, too",
    b'{"prompt": "a", "label": [NaN]}\n': "line 1: 'label' holds a number that is not finite",
    b'{"prompt": "a", "label": 1e999}\n': "line 1: 'label' holds a number that is not finite",
    b'{"prompt": "a", "n": 0}\n': "line 1: n is 0, but it must be from 1 to 1000000",
    b'{"prompt": "a", "n": 99999999999}\n': "line 1: n is 99999999999, but it must be from 1 to 1",
    b'{"prompt": "a", "n": "2"}\n': "line 1: n is '2', but it must be a whole number",
    b'{"prompt": "a", "top_logprobs": -1}\n': "line 1: top_logprobs is -1, but it must be at leas",
    b'{"prompt": "a", "top_logprobs": true}\n': "line 1: top_logprobs is True, but it must be a w",
    b'{"prompt": "a", "temperature": "1"}\n': "temperature is '1', but it must be a number",
    b'{"prompt": "a", "top_p": 0}\n': "line 1: sampling.top_p is 0, but it must be above 0",
    b'{"prompt": "a", "logit_bias": {"x": 1}}\n': 'line 1: logit_bias has "x": 1, but it must map',
    b'{"prompt": "a", "logit_bias": {"1": "2"}}\n': 'line 1: logit_bias has "1": "2", but it must',
    b'{"prompt": "a", "stop": ""}\n': "line 1: stop is '', but it must be a text that is not empty",
    b'{"prompt": "a", "stop": ["b", 3]}\n': "line 1: stop is ['b', 3], but it must be a text",
    b'{"prompt": "a", "stop": 3}\n': "line 1: stop is 3, but it must be text or a list",
    b'{"prompt": "a", "stop_ids": [1, "2"]}\n': "line 1: stop_ids is [1, '2'], but it must be a",
    b'{"prompt": "a", "stop_ids": 13}\n': "line 1: stop_ids is 13, but it must be a list",
    b'{"prompt": "a", "suffix": 3}\n': "line 1: suffix is 3, but it must be text",
    b'{"prompt": "a", "tools": {}}\n': "line 1: tools is {}, but it must be a list",
    b'{"messages": [], "continue_final_message": 1}\n': "message is 1, but it must be true or f",
    b'{"prompt": "a", "prompt": "b"}\n': "line 1: the key 'prompt' appears twice",
    b'{"prompt": 3}\n': "line 1: prompt is 3, but it must be text",
    b'{"prompt": ""}\n': "line 1: The prompt is empty",
    b'{"prompt": "a", "max_tokens": 0}\n': "line 1: max_tokens is 0",
    b'{"prompt": "a", "max_tokens": true}\n': "line 1: max_tokens is True",
    b'{"prompt": "a", "seed": -1}\n': "line 1: sampling.seed is -1",
    b'{"prompt": "a", "seed": 1.5}\n': "line 1: seed is 1.5, but it must be a whole number",
    b'{"prompt": "a", "id": NaN}\n': "line 1: id is nan, but it must be text or a whole number",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}\n": "line 1: the number 99999",
    b'{"prompt": "a", "temperature": NaN}\n': "line 1: sampling.temperature is nan, but it must be",
    b'{"prompt": "a", "temperature": 1e-10}\n': "must be 0 (greedy) or from 1e-09 to 1e+09.",
    b'{"prompt": "a", "logit_bias": {"%s": 1}}\n' % (b"9" * 5000): 'logit_bias has "9999',
    b'{"prompt": "a", "logit_bias": {"1": %s}}\n' % (b"9" * 400): 'logit_bias has "1": 9999',
    b'{"prompt": "a", "logit_bias": {"1": 1, "01": 2}}\n': "logit_bias names token 1 twice",
    '{"prompt": "a", "logit_bias": {"٣": 1}}\n'.encode(): 'line 1: logit_bias has "٣": 1, but it',
    b'{"messages": [{"role": "user", "content": "a", "role": "b"}]}\n': "the key 'role' appears tw",
    b"[" * 100000: "line 1: its JSON is nested too deeply",
    b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": "a"}], "raw": true}\n': (
        "line 2: A raw prompt is one text"
    ),
    b'{"messages": [{"role": "system", "content": "a"}], "system": "b"}\n': (
        "line 1: The chat has a system message"
    ),
    b'{"prompt": "a", "continue_final_message": true}\n': (
        "line 1: continue_final_message needs a chat"
    ),
    b'{"messages": ["x"]}\n': "line 1: messages is ['x'], but it must be a list of objects.",
}
# Known only with the tokenizer, but, so near to the file's beginning, before anything is run.
LATE = {
    b'{"prompt": "a"}\n{"messages": []}\n': "line 2: the conversation has no messages",
    b'{"prompt": "a"}\n{"messages": [{"role": "x"}]}\n': 'line 2: message 0 has the role "x"',
    b'{"prompt": "a"}\n{"prompt": "a\\ud800"}\n': r"line 2: the text holds '\ud800', which is not",
    b'{"prompt": "a"}\n{"prompt": "a", "logit_bias": {"2048": 1}}\n': (
        "line 2: sampling.logit_bias names token 2048, but the vocabulary has 2048 tokens"
    ),
    b'{"prompt": "a"}\n{"prompt": "' + b"word " * 3000 + b'"}\n': "line 2: The prompt has 3029",
    b'{"prompt": "a"}\n{"prompt": "a", "stop_ids": [5, 2048]}\n': (
        "line 2: stop_ids holds 2048, but token ids are 0 to 2047"
    ),
    b'{"prompt": "", "suffix": ""}\n': "line 1: ",
    b'{"prompt": "a", "top_logprobs": 2049}\n': "line 1: top_logprobs is 2049, but it must be from",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n': (
        "line 1: message 0 (user) has a part of type 'image_url'"
    ),
    b'{"prompt": "a", "tools": [{"type": "function"}]}\n': "line 1: tool 0 is",
}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
@pytest.mark.usefixtures("nothing_loads")
def test_refused(refuses: Callable[..., None], tmp_path: Path, content: bytes) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(content)
    argv = [f"--prompt_file={path}", f"--output={output}", "--strict"]
    refuses(argv, "prompts.jsonl", FILES[content])
    assert not output.exists()


@pytest.mark.parametrize("content", LATE, ids=range(len(LATE)))
@pytest.mark.usefixtures("loaded")
def test_refused_late(refuses: Callable[..., None], tmp_path: Path, content: bytes) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(content)
    argv = [f"--prompt_file={path}", f"--output={output}", "--strict"]
    refuses(argv, "prompts.jsonl, ", LATE[content])
    assert not output.exists()


WRONG = [
    (b'{"id": "b", "prompt": \n', 2, "line 2: it is not JSON"),
    (b'{"id": "b", "prompt": "a", "temprature": 1}\n', "b", "line 2 has the field 'temprature'"),
    (b'{"id": 7, "messages": []}\n', 7, "line 2: the conversation has no messages"),
    (b'{"prompt": "' + b"word " * 3000 + b'"}\n', 2, "line 2: The prompt has 3029 tokens"),
    (b"\xff\n", 2, "line 2 is not UTF-8"),
    (b"[" * 100000 + b"\n", 2, "line 2: its JSON is nested too deeply"),
    (b'{"id": "b", "prompt": "x", "prompt": "y"}\n', "b", "line 2: the key 'prompt' appears twice"),
    (b'{"id": "b", "prompt": "x", "id": "d"}\n', 2, "line 2: the key 'id' appears twice; keep one"),
]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("ordered", [False, True])
def test_a_wrong_prompt_gets_a_line_that_says_why(run: Run, tmp_path: Path, ordered: bool) -> None:
    """And the others are answered as they are without it."""
    path, argv = tmp_path / "prompts.jsonl", ["--temperature=1", "--n=2", *["--ordered"] * ordered]
    good = b'{"id": "a", "prompt": "snow", "max_tokens": 3}\n', b'{"id": "c", "prompt": "rain"}'
    for wrong, name, words in WRONG if ordered else WRONG[-1:]:
        path.write_bytes(wrong.join(good))
        result = run(f"--prompt_file={path}", *argv)
        assert result.code == 3
        assert "1 of 3 prompts were refused; their lines say why under 'error'." in result.err
        lines = answers_in(result.out)
        (told,) = (line for line in lines if "error" in line)
        assert "text" not in told and told["id"] == name and words in told["error"]
        answered = sorted((line["id"], line["sample"]) for line in lines if line is not told)
        assert answered == [("a", 0), ("a", 1), ("c", 0), ("c", 1)]
        if ordered:
            assert [line["id"] for line in lines] == ["a", "a", name, "c", "c"]
    path.write_bytes(b'{"id": "b", "prompt": "moon"}\n'.join(good))
    others = {
        (line["id"], line["sample"]): line
        for line in answers_in(run(f"--prompt_file={path}", *argv).out)
    }
    assert all(others[line["id"], line["sample"]] == line for line in lines if line is not told)


@pytest.mark.usefixtures("nothing_loads")
def test_a_file_without_a_single_prompt_is_refused(
    refuses: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("not\nJSON\n")
    refuses([f"--prompt_file={path}"], "line 1: it is not JSON")


@pytest.mark.usefixtures("loaded")
def test_a_prompt_that_is_wrong_further_on(run: Run, tmp_path: Path) -> None:
    """It is found when it is about to get a slot; what is answered by then stays."""
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps({"prompt": "snow", "max_tokens": 1})] * 12
    path.write_text("\n".join([*good, '{"messages": []}']))
    result = run(f"--prompt_file={path}", f"--output={output}", "--slots=2", "--strict")
    assert (result.code, result.out) == (2, "")
    last = result.err.splitlines()[-1]
    assert last.startswith(f"error: {path}, line 13: the conversation has no messages")
    answers = answers_in(output.read_text())
    assert [a["id"] for a in answers] == list(range(1, len(answers) + 1)) and len(answers) >= 8


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("ordered", [False, True])
def test_prompts_stream(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """The first answer doesn't wait for a hundred prompts to become ids."""
    path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("".join(f"rain {i}\n" for i in range(100)))
    made: list[int] = []
    real = api.Model.request

    def request(*args: Any, **options: Any) -> Any:
        made.append(len(output.read_text().splitlines()))
        return real(*args, **options)

    monkeypatch.setattr(api.Model, "request", request)
    argv = [f"--prompt_file={path}", f"--output={output}", "--max_tokens=2", "--slots=3"]
    result = run(*argv, *(["--ordered"] if ordered else []))
    assert result.code == 0 and "finished    length 100" in result.err
    assert len(made) == 100 and sum(answers == 0 for answers in made) < 10
    # Never more of them than the slots and the line before them have room for.
    assert all(i - answers < 10 for i, answers in enumerate(made))
    ids = [answer["id"] for answer in answers_in(output.read_text())]
    assert sorted(ids) == list(range(1, 101)) and (not ordered or ids == sorted(ids))


@pytest.mark.usefixtures("loaded")
def test_in_the_order_of_the_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lengths = [40, 1, 9, 2, 30, 1]
    path.write_text("".join(f'{{"prompt": "moon", "max_tokens": {n}}}\n' for n in lengths))
    argv = [f"--prompt_file={path}", "--slots=3"]
    loose, strict = (answers_in(run(*argv, *more).out) for more in ((), ("--ordered",)))
    assert [a["id"] for a in strict] == [1, 2, 3, 4, 5, 6] != [a["id"] for a in loose]
    assert sorted(loose, key=lambda a: a["id"]) == strict


@pytest.mark.usefixtures("nothing_loads")
def test_output_is_checked_before_the_model_is_loaded(
    refuses: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("moon\n")
    kept = tmp_path / "kept.jsonl"
    kept.write_text("old")
    for output, words in (
        (kept, "kept.jsonl exists already; go on with it by --resume, or choose another name"),
        (tmp_path, f"is a directory; name a file in it, as in --output={tmp_path}/answers.jsonl."),
        (".", "--output=. is a directory; name a file in it"),
        ("/dev/null", "/dev/null is no file; name one, or leave it out, and answers go to stdout"),
        (
            tmp_path / "nowhere" / "out.jsonl",
            "can't be written: No such file or directory; choose an",
        ),
        (path / "out.jsonl", "can't be written: Not a directory"),
        ("x" * 5000, "can't be written: File name too long"),
    ):
        refuses([f"--prompt_file={path}", f"--output={output}"], words)
    assert kept.read_text() == "old"


def test_a_model_that_fails_leaves_no_output(refuses: Callable[..., None], tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("moon\n")
    refuses(["--model=nowhere", f"--prompt_file={path}", f"--output={output}"], "nowhere")
    assert not output.exists()


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b'{"prompt":', b'"a"', b"}", b"\n"])))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, parts: list[bytes]) -> None:
    for name in ("prompts.jsonl", "prompts.txt"):
        path = tmp_path / name
        path.write_bytes(b"".join(parts))
        config = settings.get_config()
        config.prompt_file = str(path)
        try:
            items = prompts.read(config, prompts.options_of(config))
        except UserError as error:
            assert str(error).startswith(("--prompt_file=", str(path)))
        else:
            assert items


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """As lines of bytes do; str.splitlines knows ten more ends, and text mode one."""
    path, config = tmp_path / "prompts.txt", settings.get_config()
    wanted = ["a\rb\u2028c\u0085d\x0be", "\ufefff\r", "\rg", "h\r"]
    path.write_bytes("\r\n".join(["\ufeff" + wanted[0], *wanted[1:]]).encode())
    config.prompt_file = str(path)
    items = prompts.read(config, prompts.options_of(config))
    assert [item.prompt for item in items] == wanted
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(UserError, match="line 1 is not UTF-8 at byte 5; convert it"):
        prompts.read(config, prompts.options_of(config))


@pytest.mark.usefixtures("loaded")
def test_answers_are_those_of_the_prompts_alone(run: Run, tmp_path: Path) -> None:
    # 33 to 64 tokens each, so that a program for each batch size serves all.
    chat = [{"role": "user", "content": "Write a haiku about the moon."}]
    lines = [
        {"prompt": "Write a haiku about rivers.", "id": "é\ud800"},
        {"prompt": "Write a haiku that contains the word fern.", "id": None, "max_tokens": 5},
        {"messages": chat, "seed": 7},
        {"prompt": "An old silent pond\n" * 6, "raw": True, "max_tokens": 3},
        {
            "prompt": "Write a haiku about snow.",
            "system": "You write short poems about anything that you are asked for.",
            "id": 33,
        },
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\ufeff" + "\r\n\n".join(map(json.dumps, lines)))
    written, most = [], "--max_tokens=16"
    for slots in (1, 3):
        output = tmp_path / f"{slots}.jsonl"
        flags = [f"--prompt_file={path}", f"--slots={slots}", f"--output={output}", most]
        result = run(*flags, "--temperature=0.9", "--seed=5")
        assert (result.code, result.out) == (0, "")
        summed = "sampling    temperature 0.9, seed 5; prompts with settings of their own: 1\n"
        assert summed in result.err
        written.append(output.read_text(encoding="utf-8").splitlines())
    # Slots decide in which order the answers finish, and nothing else.
    assert sorted(written[0]) == sorted(written[1])
    answers = [json.loads(line) for line in written[0]]
    assert [a["id"] for a in answers] == ["é\ud800", 3, 5, 7, 33]
    assert [len(a["tokens"]) for a in answers[1:4:2]] == [5, 3]
    # A seed of the line's own wins over its place in the file.
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": chat}))
    alone = run(f"--prompt_file={tmp_path / 'one.jsonl'}", "--temperature=0.9", "--seed=7", most)
    assert json.loads(alone.out)["text"] == answers[2]["text"]


@pytest.mark.usefixtures("loaded")
def test_samples_of_each_prompt(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "moon"}\n{"prompt": "moon", "seed": 3, "id": "b"}\n')
    result = run(f"--prompt_file={path}", "--n=2", "--temperature=1", "--seed=3")
    answers = sorted(answers_in(result.out), key=lambda a: (str(a["id"]), a["sample"]))
    assert [(a["id"], a["sample"]) for a in answers] == [(1, 0), (1, 1), ("b", 0), ("b", 1)]
    texts = [a["text"] for a in answers]
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


@pytest.mark.usefixtures("loaded")
def test_lines_of_text_and_logprobs(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("moon\n\n  snow\n")
    result = run(f"--prompt_file={path}", "--top_logprobs=2", "--max_tokens=4")
    first, second = sorted(answers_in(result.out), key=lambda a: a["id"])
    assert (first["id"], second["id"]) == (1, 3)
    assert [entry["token"] for entry in first["logprobs"]] == first["tokens"]
    for entry in first["logprobs"]:
        (best, logprob), (_, runner_up) = entry["top"]
        assert (best, logprob) == (entry["token"], entry["logprob"])
        assert runner_up <= logprob < 0


def items_of(tmp_path: Path, *lines: dict[str, Any], **fields: Any) -> list[prompts.Item]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    config = settings.get_config()
    settings.update(config, {"prompt_file": str(path), **fields}, "the test")
    return prompts.read(config, prompts.options_of(config))


def test_a_lines_own_settings_win_over_the_configs(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    config = {"stop": ("c",), "stop_ids": "3,4", "sampling.top_k": 5, "max_tokens": 7}
    own = {"stop": "x", "stop_ids": [9], "temperature": 1, "logit_bias": {"7": -1}}
    own |= {"suffix": "", "tools": []}  # which exclude each other
    plain, line, listed = items_of(
        tmp_path,
        {"prompt": "a", "stop": None},
        {"prompt": "", **own},
        {"messages": [], "stop": ["x", "y"], "continue_final_message": True, "tools": []},
        tools=str(tmp_path / "tools.json"),
        **config,
    )
    assert (plain.options["stop"], plain.options["stop_ids"]) == (("c",), (3, 4))
    assert plain.options["tools"] == tools and plain.options["suffix"] is None
    assert (line.options["stop"], line.options["stop_ids"]) == (("x",), [9])
    assert line.options["sampling"] == Sampling(temperature=1, top_k=5, logit_bias={7: -1.0})
    assert (line.options["suffix"], line.options["max_tokens"]) == ("", 7)
    assert (listed.options["stop"], listed.options["tools"]) == (("x", "y"), [])
    assert listed.options["continue_final_message"]
    # What all lines share may be known only with the model; a line's own still wins.
    shared = plain.options | {"sampling": Sampling(temperature=0.3, top_p=0.5), "stop": ("m",)}
    assert line.over(shared).options["sampling"] == Sampling(
        temperature=1, top_p=0.5, logit_bias={7: -1.0}
    )
    assert (plain.over(shared).options["stop"], line.over(shared).options["stop"]) == (
        ("m",),
        ("x",),
    )


def test_what_a_template_takes_is_no_setting(tmp_path: Path) -> None:
    (item,) = items_of(
        tmp_path,
        {"word": "a", "suffix": "b", "stop": "c", "temperature": 2, "id": "d", "max_tokens": 3},
        **{"experiment.template": "{word}{suffix} {temperature} {id} {stop[0]}"},
    )
    assert (item.prompt, item.id, item.own) == ("ab 2 d c", "d", {"max_tokens": 3})
