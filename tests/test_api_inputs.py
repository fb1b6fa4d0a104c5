"""What may be asked of a model from Python, and how: chats, ids, asyncio; types it refuses."""

import asyncio
import contextlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import Model, Sampling, UserError, arguments, cli, prompt_lines, prompts
from tests.test_api import PROMPTS, many, one

WRONG_PROMPTS = (
    3,
    None,
    b"x",
    {"role": "user"},
    [1, "x"],
    [1.5],
    [True],
    [["x"]],
    ["x", {}],
    [None],
)
WRONG: dict[str, list[tuple[Any, str]]] = {
    "n": [(True, "a whole number"), ("1", "a whole number"), (10**12, "from 1 to 1000000")],
    "top_logprobs": [("3", "a whole number or None"), (True, "a whole number or None")],
    "raw": [("no", "True or False"), (1, "True or False")],
    "system": [(3, "a text or None"), (["x"], "a text or None")],
    "tools": [({}, "a list of dicts or None"), (["x"], "a list of dicts or None")],
    "stop": [([3], "a text or a list of texts"), (b"x", "a text or a list of texts")],
    "stop_ids": [([1.5], "a list of whole numbers"), ("13", "a list of whole numbers")],
    "max_tokens": [(True, "a whole number"), (2.0, "a whole number"), (None, "a whole number")],
    "sampling": [(None, "a Sampling"), ({"top_k": 3}, "a Sampling"), ([Sampling()], "a Sampling")],
    "samplings": [(Sampling(), "a list of Samplings or None"), ([3], "a list of Samplings or")],
    "progress": [(3, "a function or None")],
}
"""Options of generate, values that they can't have, and what they must be."""

WRONG_IDS = ("abc", 5, [1.0], [True], np.ones(3), np.ones((2, 2), np.int32), [[1]], None)


@pytest.fixture(scope="module")
def model() -> Model:
    return qwen_jax.load(dtype="float32")


def test_prompts_of_other_types(model: Model) -> None:
    for prompt in WRONG_PROMPTS:
        for method in (model.generate, model.stream, model.tokens, model.request):
            with pytest.raises(UserError) as error:
                method(prompt)  # type: ignore[call-overload, arg-type, operator]
            assert str(error.value).startswith("prompt is ")
            assert ", but it must be a text, a list of dicts" in str(error.value)
    with pytest.raises(
        UserError, match="Token ids are put to the model as they are; leave out sys"
    ):
        model.generate([5], system="x")


@pytest.mark.parametrize("name", WRONG)
def test_options_of_other_types(model: Model, name: str) -> None:
    for value, words in WRONG[name]:
        with pytest.raises(UserError) as error:
            model.generate("x", **{name: value})  # type: ignore[call-overload]
        assert str(error.value).startswith(f"{name} is ")
        assert f", but it must be {words}" in str(error.value)


def test_ids_of_other_types(model: Model) -> None:
    for ids in WRONG_IDS:
        with pytest.raises(UserError, match=r"token_ids is .*, but it must be a list of whole n"):
            model.logits(ids)  # type: ignore[arg-type]
        for pairs, words in (
            ([(ids, [1])], "pairs is"),
            (iter([([1], ids)]), "a pair to be scored"),
        ):
            with pytest.raises(UserError, match=words):
                next(model.score(pairs))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"requests is \['x'\], but it must be a list of Requests"):
        model.run(["x"])  # type: ignore[list-item]
    assert model.logits(np.array([5, 6])).shape == model.logits([5, 6]).shape


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            {"adapter": 3},
            "adapter is 3, but it must be a text, a Path or a list of texts",
        ),
        ({"model": None}, "model is None, but it must be a text or a Path"),
        ({"slots": "8"}, "slots is '8', but it must be a whole number or None"),
        ({"batch_invariant": "yes"}, "batch_invariant is 'yes', but it must be True or False"),
        ({"dtype": jnp.float32}, "dtype is <class .*, but it must be a text"),
        ({"progress": 3}, "progress is 3, but it must be a function or None"),
        ({"dtype": "int8"}, "dtype is 'int8', but it must be one of auto, float32"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ({"matmul_precision": "low"}, "matmul_precision is 'low'"),
        ({"model": "nowhere.gguf"}, "nowhere.gguf: there is no such file"),
        ({"sha256": "0" * 64}, "the SHA-256 is"),
    ],
)
def test_what_cannot_be_loaded(argument: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        qwen_jax.load(**argument)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_transfer_guard", "disallow"),
        ("jax_debug_nans", True),
        ("jax_enable_x64", True),
        ("jax_disable_jit", True),
        ("jax_no_tracing", True),
        ("jax_no_execution", True),
    ],
)
def test_strict_switches_of_jax(switch: str, value: object) -> None:
    before = jax.config.values[switch]
    jax.config.update(switch, value)
    try:
        with pytest.raises(UserError, match=f"switch {switch.upper()} is {value!r}, under which"):
            qwen_jax.load()
    finally:
        jax.config.update(switch, before)


def test_types_in_words() -> None:
    """Everything that the API declares can be told."""
    hints = qwen_jax.load.__annotations__ | qwen_jax.Options.__annotations__
    for method in (Model.generate, Model.stream, Model.score, Model.logits, Model.run):
        hints |= method.__annotations__
    for name, kind in hints.items():
        if name not in ("return", "options"):
            assert "typing" not in arguments.words(kind) and "<" not in arguments.words(kind)


def test_chats_and_ids_one_or_several(model: Model) -> None:
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    wanted = many(model, list(PROMPTS), max_tokens=4)
    ids = [model.tokens(text) for text in PROMPTS]
    for several in (chats, tuple(chats), ids, [np.array(i) for i in ids], [*ids[:2], PROMPTS[2]]):
        assert many(model, several, max_tokens=4) == wanted
    for alone in (chats[0], ids[0], np.array(ids[0], np.int32), jnp.array(ids[0])):
        assert one(model, alone, max_tokens=4) == wanted[0]
        assert "".join(model.stream(alone, max_tokens=4)) == wanted[0].text
    assert model.tokens(ids[1]) == ids[1]


def test_a_sampling_for_each_prompt(model: Model) -> None:
    samplings = [Sampling(temperature=1.0, seed=5), Sampling(), Sampling(temperature=0.7, seed=1)]
    found = many(model, list(PROMPTS), samplings=samplings, n=2, max_tokens=4)
    for i, sampling in enumerate(samplings):
        assert many(model, PROMPTS[i], sampling=sampling, n=2, max_tokens=4) == found[2 * i :][:2]
    for wrong in ({"samplings": samplings[:2]}, {"samplings": samplings, "sampling": Sampling()}):
        with pytest.raises(UserError, match=r"samplings has \d entries for 3 prompts; give"):
            model.generate(list(PROMPTS), **wrong)  # type: ignore[arg-type]


def test_progress_tells_of_every_answer(model: Model) -> None:
    told: list[tuple[int, int]] = []
    model.generate(list(PROMPTS), n=2, max_tokens=2, progress=lambda *p: told.append(p))
    assert told == [(i, 6) for i in range(1, 7)]


class TestAsyncio:
    def test_answers_are_the_same_side_by_side(self, model: Model) -> None:
        async def both() -> list[Any]:
            streamed = [piece async for piece in model.astream(PROMPTS[1], max_tokens=4)]
            answers = (model.agenerate(p, max_tokens=4) for p in (PROMPTS[0], list(PROMPTS)))
            return [streamed, *await asyncio.gather(*answers)]

        streamed, alone, several = asyncio.run(both())
        assert several == many(model, list(PROMPTS), max_tokens=4) and alone == several[0]
        assert "".join(streamed) == several[1].text and streamed[-1].finish_reason == "length"

    def test_other_tasks_go_on(self, model: Model) -> None:
        async def ticks() -> int:
            answer, count = asyncio.ensure_future(model.agenerate(PROMPTS[0])), 0
            while not answer.done():
                await asyncio.sleep(0)
                count += 1
            return count

        assert asyncio.run(ticks()) > 10

    def test_what_is_cancelled_or_left_ends(self, model: Model) -> None:
        pool = model.engine.pool

        async def leave() -> None:
            bans = Sampling(logit_bias=dict.fromkeys(model.tokenizer.stop_ids, -np.inf))
            async with contextlib.aclosing(model.astream("x", sampling=bans)) as pieces:
                await anext(pieces)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(model.agenerate(["x"] * 99, sampling=bans), 0.05)
            while any(thread.name == "generate" for thread in threading.enumerate()):
                await asyncio.sleep(0.01)

        asyncio.run(leave())
        assert pool.available == pool.size

    def test_what_is_wrong_is_raised_where_it_is_awaited(self, model: Model) -> None:
        async def first(prompt: Any) -> None:
            await anext(model.astream(prompt))

        for prompt, words in (([{"role": "user"}], "content"), (3, "prompt is 3")):
            with pytest.raises(UserError, match=words):
                asyncio.run(model.agenerate(prompt))  # type: ignore[arg-type]
            with pytest.raises(UserError, match=words):
                asyncio.run(first(prompt))


def test_arguments_that_there_are_not(model: Model) -> None:
    """What was meant is named: a setting of sampling, a near word, another engine's."""
    for call, words in (
        (lambda: model.generate("x", temperature=0.8), "mean sampling=Sampling(temperature=…)?"),
        (lambda: model.generate("x", max_new_tokens=3), "did you mean max_tokens?"),
        (lambda: model.generate("x", zzz=1), "generate takes no argument 'zzz': it takes "),
        (lambda: next(iter(model.stream("x", n=2))), "stream takes no argument 'n'"),
        (lambda: qwen_jax.load("haiku", nope=1), "load: got an unexpected keyword argument 'nope'"),
    ):
        with pytest.raises(UserError) as told:
            call()  # type: ignore[no-untyped-call]
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("flag", "prompt", "options", "words"),
    [
        ("--prompt=", "", {}, "The prompt is empty; ask something."),
        ("--raw --prompt=", "", {"raw": True}, "The prompt is empty; ask something."),
        ("--max_tokens=0", "x", {"max_tokens": 0}, "max_tokens is 0, but it must be at least 1."),
        ("--top_logprobs=-1", "x", {"top_logprobs": -1}, "top_logprobs is -1, but it must be at "),
        ("--stop=", "x", {"stop": ""}, "but it must be a text that is not empty, or"),
        (
            "--stop=a --stop=",
            "x",
            {"stop": ["a", ""]},
            "must be a text that is not empty, or",
        ),
    ],
)
def test_one_rule_for_python_flags_and_lines(
    model: Model, flag: str, prompt: str, options: dict[str, Any], words: str
) -> None:
    config = cli.parse(["run.py", *flag.split(" ")]).config
    given = {"prompt": prompt} | options
    asked = (
        lambda: prompts.single(config, prompts.options_of(config)),
        lambda: model.generate(prompt, **options),
        lambda: prompt_lines.parse(
            given, template=None, options=qwen_jax.Options(sampling=Sampling()), where="x", number=1
        ),
    )
    for ask in asked:
        with pytest.raises(UserError) as told:
            ask()  # type: ignore[no-untyped-call]
        assert words in str(told.value)


def test_a_stop_string_alone(model: Model) -> None:
    """As in a line of JSON, and in the API of OpenAI."""
    for stop in ("\n", ["\n"], iter(["\n"]), {"\n"}):
        assert one(model, PROMPTS[0], stop=stop) == one(model, PROMPTS[0], stop=("\n",))


def test_which_item_of_a_list_is_wrong(model: Model) -> None:
    biased = Sampling(logit_bias={2048: 1.0})
    for call, words in (
        (lambda: model.generate(["a", ""]), "prompt 1: The prompt is empty; ask something."),
        (lambda: model.generate([[5], [7, 2048]]), "prompt 1: The prompt has the token 2048 at in"),
        (lambda: model.generate(["a", [{"role": "user"}]]), "prompt 1: message 0 (user) has"),
        (lambda: model.generate(["a", "b"], samplings=[Sampling(), biased]), "prompt 1: sampling."),
        (lambda: model.generate(["a"], samplings=["b"]), "but it must be a list of Samplings or N"),
        (
            lambda: model.generate("a", stop_ids=[1, 2, "x"]),
            "a list of whole numbers; item 2 is 'x",
        ),
        (lambda: model.generate(["a", "b", 3]), "lists of whole numbers; item 2 is 3."),
        (lambda: [*model.score([([1], [2]), 3])], "a list of whole numbers); item 1 is 3."),
    ):
        with pytest.raises(UserError) as told:
            call()  # type: ignore[no-untyped-call]
        assert words in str(told.value)
    assert str(told.value).count("item") == 1
    with pytest.raises(UserError, match=r"^The prompt is empty"):
        model.generate("")


def test_a_tokenizer_takes_texts_and_ids(model: Model) -> None:
    tokenizer: Any = model.tokenizer
    for text in (3, None, b"x", ["x"]):
        with pytest.raises(UserError, match=r"encode takes a text, but got .*; give it as str"):
            tokenizer.encode(text)
    for ids in ("abc", 5, None):
        with pytest.raises(UserError, match=r"decode takes token ids, but got .*; give a list"):
            tokenizer.decode(ids)
    for token in (1.5, "a", None, -1):
        for method in (
            lambda t: tokenizer.decode([t]),
            tokenizer.token_bytes,
            tokenizer.token_name,
        ):
            with pytest.raises(UserError, match=f"there is no token {token!r}, only 0 to 2047"):
                method(token)
    assert tokenizer.decode(np.array([120])) == tokenizer.decode(iter([120])) == "x"
