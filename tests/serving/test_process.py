"""`run.py serve` as a process: its lines, its end, and what it refuses before it loads anything."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qwen_jax import cli

REPOSITORY = Path(__file__).parents[2]
SECRET = "a pond of words that nobody may read in a log"


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("transformers")  # In `make parity`: to start and to compile takes 8 s.
    key = tmp_path / "key"
    key.write_text("hush\n")
    command = [sys.executable, "run.py", "serve", "--port=0", f"--api_key_file={key}"]
    running = subprocess.Popen(
        [*command, "--model_name=poet", "--max_tokens=8", "--slots=1"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield running
    running.kill()
    running.communicate()


@pytest.mark.live
def test_a_life(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None and process.stdout is not None
    said = process.stderr.readline()
    found = re.fullmatch(r"poet at (http://127\.0\.0\.1:\d+), greedy unless .*\n", said)
    assert found, said
    body = {"messages": [{"role": "user", "content": SECRET}]}
    ask = {"url": f"{found[1]}/v1/chat/completions", "json": body, "timeout": 60}
    assert httpx.post(**ask).status_code == 401
    answer = httpx.post(**ask, headers={"Authorization": "Bearer hush"}).json()
    assert answer["model"] == "poet" and answer["usage"]["completion_tokens"] <= 8
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == ""
    lines = err.splitlines()
    assert [line.rpartition(" ")[0].rpartition(" ")[0] for line in lines[:2]] == [
        "POST /v1/chat/completions 401",
        "POST /v1/chat/completions 200",
    ]
    assert lines[2:] == ["ended"]
    assert "pond" not in err and "hush" not in err


@pytest.mark.live
def test_a_second_signal_ends_it(process: subprocess.Popen[str]) -> None:
    """In the midst of an answer, and says so; no traceback."""
    assert process.stderr is not None
    found = re.search(r"at (http://\S+?),", process.stderr.readline())
    assert found
    body = {"prompt": "a", "max_tokens": 500, "n": 50, "temperature": 30, "stream": True}
    key = {"Authorization": "Bearer hush"}
    with httpx.stream(
        "POST", f"{found[1]}/v1/completions", json=body, headers=key, timeout=60
    ) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()  # which would close the stream if it were let go
        next(lines)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "ended in the midst of answers" and "Traceback" not in err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--port=70000"], "serve.port is 70000, but it must be from 0"),
        (["--timeout=0"], "serve.timeout is 0.0"),
        (["--queue=-1"], "serve.queue is -1"),
        (["--max_body=0"], "serve.max_body is 0"),
        (["--max_prompt_tokens=0"], "serve.max_prompt_tokens is 0"),
        (["--api_key_file=nowhere"], "--api_key_file=nowhere can't be read"),
        (["--host=256.1.1.1"], "Nothing can listen at 256.1.1.1 port 8000"),
        (["--seed=3"], "--seed does nothing for serve"),
        (["--prompt=a"], "--prompt does nothing for serve"),
        (["--temperature=-1"], "sampling.temperature is -1.0"),
    ],
)
def test_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.main(["serve", f"--port={other.getsockname()[1]}"]) == 2
    assert "address already in use; choose another --host or --port" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "two words", "clé"])
def test_a_file_without_a_key(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(content)
    assert cli.main(["serve", f"--api_key_file={tmp_path / 'key'}"]) == 2
    assert "key" in capsys.readouterr().err


def test_without_the_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_jax.serving import listening

    monkeypatch.setattr(listening, "LIBRARIES", ("starlette", "no_such_library"))
    assert cli.main(["serve"]) == 2
    assert "no_such_library is not installed; install qwen_jax[serve]" in capsys.readouterr().err
