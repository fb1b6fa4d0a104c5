"""lm-evaluation-harness over our model. Needs the extra `eval`, so it runs in `make parity`."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from qwen_jax import api
from qwen_jax.completions import Completion
from qwen_jax.engine import steps
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.experiments.models import Sizes, remaker
from qwen_jax.model.cache import PAGE

pytest.importorskip("lm_eval", reason="needs pip install '.[eval]'")
from lm_eval.api.instance import Instance

from qwen_jax.experiments.harness import Harness

pytestmark = pytest.mark.live


def instance(*arguments: Any) -> Instance:
    return Instance("generate_until", {}, arguments, 0)


def refused(words: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert words in str(error.value)


def expected(model: api.Model, context: str, continuation: str) -> tuple[float, bool]:
    """Of the whole text in one go, in float64 by SciPy."""
    before, all_tokens = (model.tokenizer.encode(t) for t in (context, context + continuation))
    logprobs = log_softmax(model.logits(all_tokens).astype(np.float64), axis=-1)
    at = range(len(before) - 1, len(all_tokens) - 1)
    pairs = [(logprobs[i], all_tokens[i + 1]) for i in at]
    return sum(p[t] for p, t in pairs), all(p.argmax() == t for p, t in pairs)


def test_loglikelihood_and_generation(model: api.Model) -> None:
    kept: list[str] = []
    harness = Harness(model, keep=lambda key, line: kept.append(key))
    pairs = [("the moon", " over the river"), ("haiku: snow", " again the snow")]
    requests = [instance(*pair) for pair in pairs]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (logprob, greedy), pair in zip(found, pairs, strict=True):
        wanted = expected(model, *pair)
        assert logprob == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]
    # The whole text, each token given all before it and the first given the end of a text.
    text = "the moon over the river"
    (rolled,) = harness.loglikelihood_rolling([instance(text)], disable_tqdm=True)
    tokens = [harness.prefix_token_id, *model.tokenizer.encode(text)]
    logprobs = log_softmax(model.logits(tokens).astype(np.float64), axis=-1)
    total = sum(logprobs[i, t] for i, t in enumerate(tokens[1:]))
    assert rolled == pytest.approx(total, rel=1e-5)

    until = {"until": ["\n"], "max_gen_toks": 20}
    (line,) = harness.generate_until([instance("the moon", until)], True)
    whole = model.generate("the moon", raw=True, max_tokens=20)
    assert isinstance(whole, Completion) and line == whole.text.split("\n")[0]
    assert len(kept) == 4


def test_a_prompt_that_cannot_go_on_is_named(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task would have no result without it."""
    monkeypatch.setattr("qwen_jax.engine.decoding.why_not", lambda chosen, engine: "it overflowed")
    requests = [instance("the moon", {"until": ["?"], "max_gen_toks": 3})]
    refused("'the moon': it overflowed", Harness(model).generate_until, requests, True)


DRAW = {"until": ["?"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}


def test_repeats_are_draws_of_their_own(model: api.Model) -> None:
    """Whatever the order and the neighbours; what the engine draws from the recorded seed is it."""
    kept: dict[str, Any] = {}
    harness = Harness(model, keep=kept.__setitem__)
    requests = [instance(text, dict(DRAW)) for text in ["the moon"] * 4 + ["haiku: snow is"] * 4]
    found = harness.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) == 8
    # They are kept as they finish.
    order = {(line["arguments"][0], line["repeat"]): line["response"] for line in kept.values()}
    asked = [(text, repeat) for text in ("the moon", "haiku: snow is") for repeat in range(4)]
    assert [order[key] for key in asked] == found and len(kept) == 8
    for line in list(kept.values())[2::3]:
        again = model.generate(
            line["arguments"][0],
            raw=True,
            max_tokens=line["max_tokens"],
            stop=line["stop"],
            sampling=Sampling(**line["sampling"]),
        )
        assert isinstance(again, Completion) and again.text == line["response"]
    mixed = [requests[i] for i in (4, 0, 5, 1, 2, 6, 3, 7)]
    shuffled = Harness(model).generate_until(mixed, disable_tqdm=True)
    assert shuffled == [found[i] for i in (4, 0, 5, 1, 2, 6, 3, 7)]
    other = Harness(model, seed=1).generate_until(requests, disable_tqdm=True)
    assert not set(other) & set(found)
    # A task's own seed is the harness' where it has none.
    named = [instance(r.args[0], DRAW | {"seed": 0}) for r in requests]
    assert Harness(model, seed=1).generate_until(named, disable_tqdm=True) == found

    # What an interrupted run has kept is not asked for again, and each repeat has its own.
    most = {key: line["response"] for key, line in kept.items() if line != list(kept.values())[2]}
    later: list[str] = []
    resumed = Harness(model, answers=most, keep=lambda key, line: later.append(key))
    assert resumed.generate_until(requests, disable_tqdm=True) == found
    assert later == [list(kept)[2]]


def test_greedy_repeats_are_made_once(model: api.Model) -> None:
    kept: list[str] = []
    harness = Harness(model, keep=lambda key, line: kept.append(key))
    greedy = DRAW | {"do_sample": False}
    found = harness.generate_until([instance("the moon", greedy)] * 4, disable_tqdm=True)
    assert len(set(found)) == len(kept) == 1


def test_a_prompt_is_never_eaten(model: api.Model, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(model, max_length=16)
    text = "the moon over the river"
    tokens = model.tokenizer.encode(text)
    room = 16 - len(tokens)
    assert room > 1
    fits = harness._request(text, {"max_gen_toks": room})
    assert (fits.tokens, fits.max_tokens) == (tokens, room) and not caplog.messages
    for most in (room + 1, 15, 16, 32768):
        request = harness._request(text, {"max_gen_toks": most})
        assert (request.tokens, request.max_tokens) == (tokens, room)
    assert len(caplog.messages) == 1 and f"prompt of {len(tokens)}" in caplog.text
    refused("leaves no room for an answer in the context of 16", harness._request, text * 4, {})
    exact = Harness(model, max_length=len(tokens))
    refused(f"A prompt of {len(tokens)} tokens, 'the moon", exact._request, text, {})
    # Nothing to continue: the harness' own models begin with the token that ends a text.
    assert harness._request("", {}).tokens == [harness.prefix_token_id]


def test_scores_at_the_edges(model: api.Model, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(model, max_length=8)

    def score(context: str, continuation: str) -> tuple[float, bool]:
        (found,) = harness.loglikelihood([instance(context, continuation)], disable_tqdm=True)
        return found

    # Left out at the front, with a warning.
    long = "the moon over the river again and again the moon"
    tokens = model.tokenizer.encode(long + " over")[-9:]
    logprobs = log_softmax(model.logits(tokens[:-1])[-1].astype(np.float64))
    assert score(long, " over")[0] == pytest.approx(logprobs[tokens[-1]], rel=1e-5)
    assert "is longer than the model's of 8" in caplog.text
    # Spaces go to the continuation, of which none may be left for the context.
    assert score("  ", "moon") == score("", "  moon")
    refused("'' has no token of its own behind 'the moon'", score, "the moon", "")
    refused("'' has no token of its own behind ''", score, "", "")
    refused("is longer than the context of 8", score, "the", long)
    assert harness.loglikelihood_rolling([instance("")], disable_tqdm=True) == [0.0]


def test_arguments(model: api.Model, caplog: pytest.LogCaptureFixture) -> None:
    refused("mean the same", Harness, "a.gguf", pretrained="b.gguf")
    refused("max_length is 0", Harness, model, max_length=0)
    refused("but it must be from 1 to 512", Harness, model, max_length=10**6)
    refused("max_gen_toks is 0", Harness, model, max_gen_toks=0)
    refused("prefix_token_id is 5000", Harness, model, prefix_token_id=5000)
    refused("generation_config is 'yes'", Harness, model, generation_config="yes")
    refused("no argument dtyp; did you mean dtype?", Harness, dtyp="float32")
    refused("dtype is 'float8'", Harness, dtype="float8")
    refused("already loaded", Harness, model, dtype="float32")
    refused("has no chat template of the name 'rag'", Harness(model).chat_template, "rag")
    harness = Harness(pretrained=model, max_gen_toks=7, prefix_token_id=5, trust_remote_code=True)
    assert harness.prefix_token_id == 5 and harness._request("a", {}).max_tokens == 7
    assert "/" not in harness.tokenizer_name
    assert harness.chat_template(True) == model.tokenizer.chat_template


def test_texts_begin_as_the_checkpoint_has_it(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm_eval's `hf`: a prefix is put before a text, unless it begins so or nobody wants one."""
    harness, plain = Harness(model), model.tokenizer.encode("the moon")
    assert harness.tok_encode("the moon") == plain  # Qwen2.5 has none.
    end = harness.eot_token_id
    monkeypatch.setattr(type(model.tokenizer), "prefix_ids", (end,))
    assert harness.tok_encode("the moon") == [end, *plain]
    assert harness.tok_encode("the moon", add_special_tokens=False) == plain
    marked = model.tokenizer.decode([end], skip_special=False) + "the moon"
    assert harness.tok_encode(marked) == [end, *plain]
    assert harness.tok_encode(marked, add_special_tokens=True) == [end, end, *plain]


def test_the_seed_is_the_command_lines(model: api.Model) -> None:
    """lm_eval seeds Python's generator and then makes the model, which leaves it as it was."""

    def drawn(flag: int, **given: Any) -> tuple[int, float]:
        random.seed(flag)
        harness = Harness.create_from_arg_obj({"model": model, **given}, {"device": None})
        return harness._request("a", {"temperature": 1}).sampling.seed, random.random()

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(7)[1] == drawn(7, seed=5)[1] and drawn(7, seed=5)[0] == 5


def test_scores_share_what_texts_begin_with(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endings of one long context: its pages are computed once, and nothing changes by it."""
    context = ("the moon over the river " * 60).rstrip()
    requests = [instance(context, ending) for ending in (" again", " and snow", " over", " again")]
    kept: list[str] = []
    entered: list[int] = []
    for name in ("extend", "score"):
        real = getattr(steps, name)

        def counted(*args: Any, real: Any = real) -> Any:
            entered.append(int(np.maximum(args[6] - args[5], 0).sum()))
            return real(*args)

        monkeypatch.setattr(steps, name, counted)
    fresh = remaker(model)(Sizes(2, False))
    harness = Harness(fresh, keep=lambda key, line: kept.append(key))
    found = harness.loglikelihood(requests, disable_tqdm=True)
    length = len(model.tokenizer.encode(context))
    assert length > 2 * PAGE and sum(entered) < length + 3 * PAGE
    assert len(kept) == 3 and found[0] == found[3]
    for (logprob, greedy), request in zip(found, requests, strict=True):
        wanted = expected(model, *request.args)
        assert logprob == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]
    # What is known is not asked for again.
    entered.clear()
    assert harness.loglikelihood(requests, disable_tqdm=True) == found and not entered


def test_slots(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def load(*args: object, slots: int | None, **options: object) -> api.Model:
        given.append(slots)
        return model

    monkeypatch.setattr(api, "load", load)
    for sizes in ({}, {"batch_size": 3}, {"batch_size": "auto", "max_batch_size": 2}):
        Harness("x.gguf", **sizes)
    assert given == [None, 3, 2]
    refused("batch_size is of a model already loaded", Harness, model, 4)


def test_what_was_thought_is_dropped(model: api.Model) -> None:
    options = {"max_gen_toks": 30, "until": None}
    (whole,) = Harness(model).generate_until([instance("the moon is", options)], disable_tqdm=True)
    end = whole.split()[2]
    tokens = model.generate("the moon is", raw=True, max_tokens=30).tokens
    # The last time counts, as in lm_eval's own models.
    for marker in (end, tokens[2], str(tokens[2])):
        harness = Harness(model, think_end_token=marker)
        (found,) = harness.generate_until([instance("the moon is", options)], disable_tqdm=True)
        if marker == end:
            assert found == whole.split(end)[-1].lstrip()
        else:
            last = len(tokens) - tokens[::-1].index(tokens[2])
            assert found == model.tokenizer.decode(tokens[last:]).lstrip()


def test_chats(model: api.Model) -> None:
    harness = Harness(model)
    chat = [
        {"role": "user", "content": "Name a city"},
        {"role": "assistant", "content": "The city is"},
    ]
    prefix = harness.apply_chat_template(chat, add_generation_prompt=False)
    assert prefix.endswith("<|im_start|>assistant\nThe city is")
    assert harness.apply_chat_template(chat).endswith("<|im_end|>\n<|im_start|>assistant\n")
