"""The Python API on the bundled model: load, generate, stream, batches and logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

import qwen_jax
from qwen_jax import Completion, Model, Request, Sampling, UserError, api, opening
from qwen_jax.text.chat import DEFAULT_SYSTEM
from qwen_jax.text.vocabulary import PATTERN
from qwen_jax.weights.gguf_file import open_gguf
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf

PROMPTS = ["Write a haiku about rivers.", "snow", "Write a haiku that contains the word fern."]


@pytest.fixture(scope="module")
def model() -> Model:
    return qwen_jax.load(dtype="float32")


def one(model: Model, prompt: Any, **options: Any) -> Completion:
    completion = model.generate(prompt, **options)
    assert isinstance(completion, Completion)
    return completion


def many(model: Model, prompt: Any, **options: Any) -> list[Completion]:
    completions = model.generate(prompt, **options)
    assert isinstance(completions, list)
    return completions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_public_names() -> None:
    for name in qwen_jax.__all__:
        assert getattr(qwen_jax, name).__name__.removeprefix("qwen_jax.") == name
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        qwen_jax.generate  # noqa: B018


class TestLogits:
    def test_greedy_is_their_argmax_at_every_step(self, model: Model) -> None:
        completion = one(model, PROMPTS[0])
        prompt = model.tokens(PROMPTS[0])
        assert completion.prompt_tokens == len(prompt)
        logits = model.logits([*prompt, *completion.tokens])
        assert logits.shape == (len(prompt) + len(completion.tokens), model.config.vocab_size)
        assert logits.dtype == np.float32 and isinstance(logits, np.ndarray)
        chosen = logits[len(prompt) - 1 : -1].argmax(axis=-1)
        assert tuple(chosen) == completion.tokens
        assert completion.tokens[-1] in model.tokenizer.stop_ids
        assert completion.finish_reason == "stop"
        assert completion.text == model.tokenizer.decode(completion.tokens)

    def test_logprobs_are_their_log_softmax(self, model: Model) -> None:
        # The model's own, whatever the sampling does to them.
        hot = Sampling(temperature=2.0, top_k=50, repetition_penalty=1.3, logit_bias={5: 3.0})
        completion = one(model, PROMPTS[0], top_logprobs=3, sampling=hot, max_tokens=12)
        prompt = model.tokens(PROMPTS[0])
        logits = model.logits([*prompt, *completion.tokens])
        reference = log_softmax(logits)[len(prompt) - 1 : -1]
        assert completion.logprobs is not None and len(completion.logprobs) == 12
        for entry, row, token in zip(
            completion.logprobs, reference, completion.tokens, strict=True
        ):
            assert entry.token == token
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            best = np.argsort(-row)[:3]
            assert [i for i, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in entry.top], row[best], atol=1e-4)

    def test_refused(self, model: Model) -> None:
        context = model.config.context_length
        assert model.logits([1] * context).shape[0] == context
        for tokens, words in (
            ([], "1 to 512 tokens"),
            ([1] * (context + 1), "but got 513"),
            ([2048], "token_ids has the token 2048 at index 0, but .* has tokens 0 to 2047"),
            ([5, -1], "the token -1 at index 1"),
        ):
            with pytest.raises(UserError, match=words):
                model.logits(tokens)


class TestGenerate:
    def test_a_list_equals_each_alone(self, model: Model) -> None:
        together = many(model, PROMPTS)
        assert together == [one(model, prompt) for prompt in PROMPTS]
        assert many(model, PROMPTS[:1]) == together[:1]
        assert model.generate([]) == []

    def test_a_sampled_list_equals_each_alone(self, model: Model) -> None:
        hot = {"temperature": 0.9, "top_p": 0.95}
        together = many(model, PROMPTS, sampling=Sampling(**hot, seed=11))
        alone = [
            one(model, prompt, sampling=Sampling(**hot, seed=11 + i))
            for i, prompt in enumerate(PROMPTS)
        ]
        assert together == alone

    def test_samples_of_a_prompt_draw_from_the_following_seeds(self, model: Model) -> None:
        def hot(seed: int) -> Sampling:
            return Sampling(temperature=1.2, seed=seed)

        samples = many(model, PROMPTS[0], n=3, sampling=hot(2**32 - 2))
        assert len({s.text for s in samples}) == 3
        assert samples == many(model, PROMPTS[0], n=3, sampling=hot(2**32 - 2))
        for sample, seed in zip(samples, (2**32 - 2, 2**32 - 1, 0), strict=True):
            assert sample == one(model, PROMPTS[0], sampling=hot(seed))
        pairs = many(model, PROMPTS[:2], n=2, sampling=hot(3))
        assert pairs[:2] == many(model, PROMPTS[0], n=2, sampling=hot(3))

    def test_chats_and_system_prompts(self, model: Model) -> None:
        chat = [{"role": "user", "content": "snow"}]
        assert one(model, chat) == one(model, "snow")
        tokens = model.tokens("snow")
        assert DEFAULT_SYSTEM in model.tokenizer.decode(tokens, skip_special=False)
        told = model.tokens("snow", system="Be brief.")
        assert told == model.tokens([{"role": "system", "content": "Be brief."}, *chat])
        assert DEFAULT_SYSTEM not in model.tokenizer.decode(told)

    def test_raw_text_is_continued(self, model: Model) -> None:
        tokens = model.tokenizer.encode("An old silent pond")
        assert model.tokens("An old silent pond", raw=True) == tokens
        completion = one(model, "An old silent pond", raw=True, max_tokens=1)
        assert completion.tokens == (int(model.logits(tokens)[-1].argmax()),)
        assert completion.finish_reason == "length"

    def test_limits(self, model: Model) -> None:
        whole = one(model, PROMPTS[0])
        for most in (1, 2, 5):
            part = one(model, PROMPTS[0], max_tokens=most)
            assert part.tokens == whole.tokens[:most] and part.finish_reason == "length"
        # The prompt and what is generated fill the context, and no more.
        text = "x" * 505
        room = model.config.context_length - len(model.tokens(text, raw=True))
        assert 0 < room < 30
        banned = Sampling(logit_bias=dict.fromkeys(model.tokenizer.stop_ids, -np.inf))
        completion = one(model, text, raw=True, max_tokens=1000, sampling=banned)
        assert (len(completion.tokens), completion.finish_reason) == (room, "length")

    def test_stop_strings(self, model: Model) -> None:
        text = one(model, PROMPTS[0]).text
        for at in range(0, len(text) - 3, 5):
            stop = text[at : at + 3]
            completion = one(model, PROMPTS[0], stop=["\0", stop])
            assert completion.text == text[: text.index(stop)]
            assert completion.finish_reason == "stop"

    def test_stop_ids_are_not_shown(self, model: Model) -> None:
        whole = one(model, "haiku: snow")
        token = next(t for t in whole.tokens if model.tokenizer.decode([t]) == "\n")
        cut = one(model, "haiku: snow", stop_ids=[token])
        at = whole.tokens.index(token)
        assert (cut.tokens, cut.finish_reason) == (whole.tokens[: at + 1], "stop")
        assert cut.text == model.tokenizer.decode(whole.tokens[:at])

    def test_a_final_message_is_continued(self, model: Model) -> None:
        """What the model wrote itself, cut anywhere between tokens, is gone on with as it was."""
        asked = {"role": "user", "content": "haiku: snow"}
        whole = one(model, [asked])
        for at in (1, 5):
            begun = model.tokenizer.decode(whole.tokens[:at])
            chat = [asked, {"role": "assistant", "content": begun}]
            assert model.tokens(chat, continue_final_message=True) == [
                *model.tokens([asked]),
                *whole.tokens[:at],
            ]
            rest = one(model, chat, continue_final_message=True)
            assert (begun + rest.text, rest.finish_reason) == (whole.text, "stop")

    def test_settings_that_do_nothing_are_told(
        self, model: Model, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            one(model, "haiku: snow", max_tokens=1, sampling=Sampling(top_p=0.9))
        next(model.stream("haiku: snow", sampling=Sampling(seed=3)))
        one(model, "haiku: snow", max_tokens=1)
        assert [text.split("greedy: ")[1] for text in caplog.messages] == [
            "top_p does nothing; set a temperature.",
            "seed does nothing; set a temperature.",
        ]

    def test_wrong_arguments(self, model: Model) -> None:
        long = "word " * 3000
        for arguments, words in (
            ({"prompt": long}, "has 3029 tokens, but .* context of 512"),
            ({"prompt": ["snow", long]}, "has 3029 tokens"),
            ({"prompt": "", "raw": True}, "The prompt is empty"),
            ({"prompt": "x", "n": 0}, "n is 0"),
            ({"prompt": "x", "n": 1.5}, "n is 1.5, but it must be a whole"),
            ({"prompt": "x", "max_tokens": -1}, "max_tokens is -1"),
            (
                {"prompt": "x", "max_tokens": 2.0},
                "max_tokens is 2.0, but it must be a whole",
            ),
            ({"prompt": "x", "max_tokens": "2"}, "max_tokens is '2'"),
            ({"prompt": "x", "stop": 3}, "stop is 3, but it must be a text or a list"),
            ({"prompt": "x", "stop_ids": 3}, "stop_ids is 3, but it must be a list"),
            ({"prompt": "x", "sampling": {"top_k": 3}}, "sampling is {'top_k': 3}, but it must"),
            ({"prompt": "x", "sampling": Sampling(logit_bias={2048: 1})}, "names token 2048"),
            ({"prompt": "x", "top_logprobs": 4000}, "top_logprobs is 4000"),
            ({"prompt": [{"role": "user"}]}, "has no content"),
            (
                {"prompt": ["snow", {"role": "user", "content": "x"}]},
                "prompt is .'snow', {'content'",
            ),
            ({"prompt": "x", "raw": True, "system": "y"}, "raw prompt is one text"),
            (
                {"prompt": [{"role": "system", "content": "x"}], "system": "y"},
                "a system message of its own",
            ),
        ):
            with pytest.raises(UserError, match=words):
                model.generate(**arguments)  # type: ignore[arg-type]

    def test_unknown_options_are_not_dropped(self, model: Model) -> None:
        for method in (model.generate, model.stream, model.request):
            with pytest.raises(UserError, match="takes no argument 'temperature'; did you mean"):
                list(method("x", temperature=1.0))  # type: ignore[call-arg, call-overload, arg-type]


def test_stops_that_can_be_gone_through_once(model: Model) -> None:
    (line_break,) = model.tokenizer.encode("\n")
    for options in ({"stop": ["\n"]}, {"stop_ids": [line_break]}):
        wanted = model.generate(list(PROMPTS[:2]), **options)  # type: ignore[arg-type]
        once = {name: iter(value) for name, value in options.items()}
        found = model.generate(list(PROMPTS[:2]), **once)  # type: ignore[arg-type]
        assert [c.text for c in found] == [c.text for c in wanted]
        assert all("\n" not in c.text for c in found)


class TestStream:
    def test_pieces_are_the_text(self, model: Model) -> None:
        hot = Sampling(temperature=0.8, seed=3)
        for options in ({}, {"sampling": hot}, {"stop": ["tomorrow"]}, {"max_tokens": 5}):
            pieces = list(model.stream("Write a haiku about é.", **options))  # type: ignore[arg-type]
            assert "".join(pieces) == one(model, "Write a haiku about é.", **options).text
            assert all(pieces[:-1]) and "\ufffd" not in "".join(pieces)
            assert len(pieces) > 1

    def test_pieces_say_what_they_were_made_of(self, model: Model) -> None:
        for options in ({"stop": ["tomorrow"]}, {"max_tokens": 5}, {"top_logprobs": 2}):
            whole = one(model, PROMPTS[0], **options)
            pieces = list(model.stream(PROMPTS[0], **options))  # type: ignore[arg-type]
            assert sum((piece.tokens for piece in pieces), ()) == whole.tokens
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            assert pieces[-1].finish_reason == whole.finish_reason
            logprobs = [piece.logprobs for piece in pieces]
            if whole.logprobs is None:
                assert logprobs == [None] * len(pieces)
            else:
                assert sum((part for part in logprobs if part), ()) == whole.logprobs

    def test_comes_while_it_is_made(self, model: Model) -> None:
        stream = model.stream(PROMPTS[0])
        first = next(stream)
        assert first and len(first) < len(one(model, PROMPTS[0]).text)
        stream.close()  # type: ignore[attr-defined]

    def test_refused_at_the_first_piece(self, model: Model) -> None:
        with pytest.raises(UserError, match="content"):
            next(model.stream([{"role": "user"}]))


class TestLoad:
    def test_progress(self) -> None:
        calls: list[tuple[int, int]] = []
        api.load(progress=lambda done, total: calls.append((done, total)))
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(done) and done[-1] == totals[0]
        assert set(totals) == {sum(t.nbytes for t in open_gguf(opening.locate()).tensors.values())}

    @pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
    def test_dtypes(self, model: Model, dtype: str) -> None:
        other = api.load(dtype=dtype)
        assert other.engine.spec.cache == jnp.dtype("float32" if dtype == "auto" else dtype)
        tokens = model.tokens(PROMPTS[0])
        ours, reference = other.logits(tokens), model.logits(tokens)
        assert ours.dtype == np.float32
        error = np.linalg.norm(ours - reference) / np.linalg.norm(reference)
        # Half a unit in the last place of the dtype, which some dozens of roundings add up.
        assert error <= {"auto": 0, "bfloat16": 32 * 2**-9, "float16": 32 * 2**-12}[dtype]


CONFIG = tiny_config(vocab_size=2080, tied=False)
"""With 32 rows of padding after the bundled model's 2,048 tokens."""


@pytest.fixture(scope="module")
def tokenizer_metadata() -> dict[str, Any]:
    metadata = open_gguf(opening.locate()).metadata
    kept = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    types = kept["tokenizer.ggml.token_type"].tolist()
    return kept | {"tokenizer.ggml.token_type": types, "tokenizer.chat_template": None}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tokenizer_metadata: dict[str, Any]) -> Model:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, CONFIG, random_parameters(CONFIG), metadata=tokenizer_metadata)
    return api.load(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer_metadata: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tiny"
    write_hf(path, CONFIG, random_parameters(CONFIG))
    tokens = tokenizer_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in tokenizer_metadata["tokenizer.ggml.merges"]]
    bpe = models.BPE({t: i for i, t in enumerate(tokens) if not t.startswith("<|")}, merges)
    reference = tokenizers.Tokenizer(bpe)
    reference.normalizer = normalizers.NFC()
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    reference.add_special_tokens([t for t in tokens if t.startswith("<|")])
    reference.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


class TestBothFormats:
    def test_are_one_model(self, gguf: Model, directory: Path) -> None:
        other = api.load(directory)
        text = "Write a haiku about <|im_end|> é!"
        assert other.tokens(text) == gguf.tokens(text)
        tokens = gguf.tokens(text)
        np.testing.assert_array_equal(other.logits(tokens), gguf.logits(tokens))
        hot = Sampling(temperature=1.0, seed=1)
        assert one(other, text, sampling=hot) == one(gguf, text, sampling=hot)

    def test_padding_is_never_chosen(self, gguf: Model) -> None:
        hot = Sampling(temperature=30.0)  # nearly uniform over 2,080 rows
        completions = many(gguf, "x", raw=True, n=8, max_tokens=200, sampling=hot)
        assert sum(len(c.tokens) for c in completions) > 600
        assert max(max(c.tokens) for c in completions) < gguf.tokenizer.vocab_size == 2048
        with pytest.raises(UserError, match="from 0 to the 2048 tokens"):
            gguf.generate("x", top_logprobs=2049)

    def test_a_tokenizer_of_another_model_is_refused(self, directory: Path, tmp_path: Path) -> None:
        small = tiny_config(vocab_size=1000)
        write_hf(tmp_path / "small", small, random_parameters(small))
        shutil.copy(directory / "tokenizer.json", tmp_path / "small")
        with pytest.raises(UserError, match="2048 tokens, but the embedding only 1000 rows"):
            api.load(tmp_path / "small")

    def test_ids_outside_the_vocabulary_are_refused(self, gguf: Model) -> None:
        for tokens, words in (([5, 999_999], "999999 at index 1"), ([-1], "-1 at index 0")):
            with pytest.raises(UserError, match=f"request 1: The prompt has the token {words}, "):
                list(gguf.run([Request([5], 1), Request(tokens, 3)]))
        assert list(gguf.run([])) == []

    def test_what_is_no_prompt_is_refused(self, gguf: Model) -> None:
        for prompt in ({"role": "user", "content": "x"}, iter(["x"])):
            with pytest.raises(UserError, match="it must be a text, a list of dicts, a list of wh"):
                gguf.generate(prompt)  # type: ignore[arg-type]

    def test_without_a_template_it_is_chatml_and_says_so(
        self, gguf: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[tuple[object, ...]] = []
        monkeypatch.setattr(api.logging, "warning", lambda *arguments: said.append(arguments))
        gguf = Model(gguf.engine, gguf.tokenizer)  # one that has not said so yet
        tokens = gguf.tokens("Hi <3")
        assert gguf.tokenizer.decode(tokens, skip_special=False) == (
            f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
            "<|im_start|>user\nHi <3<|im_end|>\n<|im_start|>assistant\n"
        )
        gguf.tokens("Once is enough")
        ((text, *values),) = said
        assert "has no chat template: using ChatML" in str(text) % tuple(values)
