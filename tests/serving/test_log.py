"""What the log says of requests: one line each, whatever callers write into them."""

import json
import re
from urllib.parse import quote, unquote

import httpx
import pytest

import qwen_jax
from tests.serving.conftest import served

ENDS = "\n\r\v\f\x1b\x85\u2028\u2029"
FORGED = f"{ENDS}POST /v1/chat/completions 200 0.004 s{ENDS}ERROR: root"


def test_a_request_is_one_line(model: qwen_jax.Model, capsys: pytest.CaptureFixture[str]) -> None:
    with served(model, log_prompts=True) as found:
        assert httpx.get(f"{found.url}/x{quote(FORGED)}").status_code == 404
        body = {"prompt": FORGED, "max_tokens": 1, "x\nERROR: y": 1}
        assert found.post("/v1/completions", body).status_code == 400
        assert found.post("/v1/completions", body | {"model": FORGED}).status_code == 404
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5, lines
    # Four words, whatever the path holds; and as it was asked for.
    assert re.fullmatch(r"GET /x(\S+) 404 [\d.]+ s", lines[0])
    assert unquote(lines[0].split()[1]) == f"/x{FORGED}"
    assert [json.loads(line) for line in lines[1::2]] == [{"prompt": FORGED}] * 2
    for line, status in zip(lines[2::2], (400, 404), strict=True):
        assert line.startswith(f"POST /v1/completions {status} ")
