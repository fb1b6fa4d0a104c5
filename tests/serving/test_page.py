"""The page at `/`: what it may do, and what it does in Chromium, where there is one."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import qwen_jax
from qwen_jax.options import Options
from qwen_jax.serving.limits import Key
from tests.serving.browser import Tab, tab
from tests.serving.conftest import Served, served

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SNOW = [{"role": "user", "content": "haiku: snow"}]


def test_it_needs_nothing_else(haiku: Served) -> None:
    answer = httpx.get(f"{haiku.url}/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "{{" not in answer.text
    # What an outer address could be in: attributes, styles, and a script's strings.
    assert not re.search(r"(src|href)=(?!\"data:)|url\(|@import|https?:|//[a-z]+\.", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "connect-src 'self'" in policy


def test_it_asks_for_the_key_and_needs_none(model: qwen_jax.Model) -> None:
    with served(model, Key("hush")) as found:
        assert httpx.get(f"{found.url}/").status_code == 200
        assert "hush" not in httpx.get(f"{found.url}/").text
        assert httpx.get(f"{found.url}/v1/models").status_code == 401
        # A page of another name may have been pointed here.
        assert httpx.get(f"{found.url}/", headers={"Host": "evil.example"}).status_code == 403


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if BROWSER is None:
        pytest.skip("there is no chromium")
    with tab(BROWSER, tmp_path_factory.mktemp("profile")) as found:
        yield found
        assert found.log == []


def answered(browser: Tab, text: str) -> str:
    """Writes a message, and returns all that the page shows once it is answered."""
    before = browser.run("document.querySelectorAll('.answer').length")
    browser.run("document.querySelector('#text').focus()")
    browser.write(text)
    browser.enter()
    browser.wait(f"document.querySelectorAll('.answer').length === {before + 1}")
    browser.wait("document.querySelector('.note button')")
    return str(browser.run("document.querySelector('main').innerText"))


@pytest.mark.long
def test_a_chat(haiku: Served, model: qwen_jax.Model, browser: Tab) -> None:
    """It shows what `generate` writes, remembers it, and says how likely each token was."""
    browser.asked.clear()
    browser.open(f"{haiku.url}/")
    browser.wait("document.title === 'haiku'")
    right = model.generate(SNOW, max_tokens=24, top_logprobs=5)
    shown = answered(browser, "haiku: snow")
    assert right.text in shown
    count = len(right.tokens) - 1  # without the one that ends it
    assert re.search(rf"{count} tokens · [\d.]+ tokens/s · first after [\d.]+ s · stop", shown)
    spans = browser.run("[...document.querySelectorAll('.token')].map(t => t.textContent)")
    assert "".join(spans) == right.text and len(spans) == count
    browser.point(".token:nth-child(2)")
    about = browser.run("document.querySelector('#about').innerText")
    entry = right.logprobs[1]
    name = model.tokenizer.token_bytes(entry.token).decode()
    assert json.dumps(name) in about and f"{entry.logprob:.4f}" in about
    assert about.count("%") == 5
    chat = [*SNOW, {"role": "assistant", "content": right.text}]
    second = model.generate([*chat, {"role": "user", "content": "haiku: rust"}], max_tokens=24)
    assert second.text in answered(browser, "haiku: rust")
    browser.point(".note button", click=True)
    browser.wait("document.querySelectorAll('.answer').length === 2")
    browser.wait("document.querySelector('.note button')")
    assert browser.run("document.querySelector('main').innerText").count(second.text) == 1
    assert {url.removeprefix(haiku.url) for url in browser.asked} == {
        "/",
        "/v1/models",
        "/v1/chat/completions",
    }


@pytest.mark.long
def test_settings_and_errors(haiku: Served, model: qwen_jax.Model, browser: Tab) -> None:
    def fill(name: str, value: str) -> None:
        browser.run(f"document.querySelector('[name={name}], #{name}').value = '{value}'")

    browser.open(f"{haiku.url}/")
    asked = {"temperature": "1.1", "top_k": "50", "seed": "7", "max_tokens": "9"}
    for name, value in asked.items():
        fill(name, value)
    fill("system", "You are a crow.")
    sampling = qwen_jax.Sampling(temperature=1.1, top_k=50, seed=7)
    chat = [{"role": "system", "content": "You are a crow."}, *SNOW]
    right = model.generate(chat, sampling=sampling, max_tokens=9)
    shown = answered(browser, "haiku: snow")
    assert right.text in shown and shown.count("length") == 1
    fill("temperature", "-1")
    assert "temperature is -1" in answered(browser, "haiku: snow")


@pytest.mark.long
def test_what_is_refused_is_no_part_of_the_chat(
    haiku: Served, model: qwen_jax.Model, browser: Tab
) -> None:
    """Later messages are answered as if it had not been; and an answer that can't be had again
    stays."""
    browser.open(f"{haiku.url}/")
    browser.run("document.querySelector('[name=max_tokens]').value = '9'")
    assert "context of 512" in answered(browser, "word " * 600)
    right = model.generate(SNOW, max_tokens=9).text
    assert right in answered(browser, "haiku: snow")
    assert "context of 512" in answered(browser, "word " * 600)

    asked = [*SNOW, {"role": "assistant", "content": right}, {"role": "user", "content": "rust"}]
    second = model.generate(asked, max_tokens=9).text
    assert second in answered(browser, "rust")
    shown = "document.querySelector('main').innerText"
    browser.run("document.querySelector('[name=temperature]').value = '-1'")
    for _ in range(2):
        browser.point(".note button", click=True)
        browser.wait(f"{shown}.includes('temperature is -1')")
        browser.wait("document.querySelector('.note button')")
        assert browser.run(shown).count(second) == 1
    browser.run("document.querySelector('[name=temperature]').value = ''")
    asked += [{"role": "assistant", "content": second}, {"role": "user", "content": "moss"}]
    assert model.generate(asked, max_tokens=9).text in answered(browser, "moss")

    # One that was refused can be asked again, once that is mended.
    browser.run("document.querySelector('[name=temperature]').value = '-1'")
    assert "temperature is -1" in answered(browser, "tea")
    browser.run("document.querySelector('[name=temperature]').value = ''")
    browser.point(".note button", click=True)
    asked.append({"role": "assistant", "content": model.generate(asked, max_tokens=9).text})
    third = model.generate([*asked, {"role": "user", "content": "tea"}], max_tokens=9).text
    browser.wait(f"{shown}.includes({json.dumps(third)})")


@pytest.mark.long
def test_an_answer_is_stopped(haiku: Served, browser: Tab) -> None:
    browser.open(f"{haiku.url}/")
    browser.run("document.querySelector('[name=max_tokens]').value = '2000'")
    browser.run("document.querySelector('[name=temperature]').value = '30'")
    browser.run("document.querySelector('#text').value = 'x'")
    browser.point("#send", click=True)
    browser.wait("document.querySelectorAll('.token').length > 5")
    browser.point("#send", click=True)
    browser.wait("document.querySelector('.note').innerText.includes('stopped')")
    haiku.settle()


@pytest.mark.long
def test_a_text_is_no_markup(model: qwen_jax.Model, browser: Tab) -> None:
    """Neither a model's, nor what is asked, nor a token's where one points at it."""
    evil = "<img src=x onerror=\"document.title='caught'\"><script>document.title='caught'</script>"
    held = qwen_jax.Constraint.choice([evil])
    with served(model, options=Options(max_tokens=200, constraint=held)) as found:
        browser.open(f"{found.url}/")
        browser.wait("document.title === 'haiku'")
        assert answered(browser, evil).count(evil) == 2
        browser.point(".token:nth-child(2)")
        markup = "main img, main script, #about img, #about script"
        assert browser.run(f"document.querySelectorAll('{markup}').length") == 0
        assert browser.run("document.title") == "haiku"


@pytest.mark.long
def test_a_key_is_asked_for(model: qwen_jax.Model, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("there is no chromium")
    with served(model, Key("hush")) as found, tab(BROWSER, tmp_path) as browser:
        browser.open(f"{found.url}/")
        browser.wait("document.querySelector('h1').textContent.includes('API key')")
        assert "API key is missing or wrong" in answered(browser, "haiku: snow")
        browser.run("document.querySelector('#key').value = 'hush'")
        browser.point(".note button", click=True)
        browser.wait("document.querySelectorAll('.token').length > 5")


@pytest.mark.long
def test_a_server_that_has_gone(model: qwen_jax.Model, browser: Tab) -> None:
    """What was asked is still there, and can be asked again."""
    with served(model) as found:
        browser.open(f"{found.url}/")
        browser.wait("document.title === 'haiku'")
    assert "The server can't be reached." in answered(browser, "haiku: snow")
    browser.point(".note button", click=True)
    browser.wait("document.querySelector('.error')")
    assert browser.run("document.querySelectorAll('.user').length") == 1


@pytest.mark.long
def test_a_phone(haiku: Served, browser: Tab) -> None:
    """Nothing is wider than the screen, nor below it, and letters are large enough."""
    browser.open(f"{haiku.url}/", 320, 560)
    answered(browser, "w" * 200)
    browser.run("document.querySelector('summary').click()")
    for selector in ("body", "#send", "#text", "#settings", ".user", ".answer"):
        found = f"document.querySelector('{selector}')"
        place = browser.run(f"{found}.getBoundingClientRect().toJSON()")
        assert place["left"] >= 0 and place["right"] <= 320, selector
    assert browser.run("document.documentElement.scrollWidth") <= 320
    assert browser.run("document.querySelector('#send').getBoundingClientRect().bottom") <= 560
    sizes = browser.run(
        "[...document.querySelectorAll('textarea, input, .answer')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 16  # below it phones zoom in
