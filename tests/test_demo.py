"""The bundled model: its training text, its tokenizer, its file, and what it writes."""

import dataclasses
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen_jax import api, opening
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.loading import read_tokenizer
from qwen_jax.text.chat import render_chat
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tools import demo_corpus, demo_gguf, demo_rows, demo_tokenizer
from tools.demo_words import TEXT_DIR, heldout_words, read_lines
from tools.eval_demo import evaluate, score

SHIPPED = opening.locate()


@pytest.fixture(scope="module")
def chats() -> list[demo_corpus.Chat]:
    return list(demo_corpus.chats(3, 0, 3000, demo_corpus.word_source(["lan", "tern", "moo"])))


@pytest.fixture(scope="module")
def vocabulary(chats):
    texts = [re.sub(r"<\|\w+\|>", "", chat.render()) for chat in chats]
    return demo_tokenizer.train_vocabulary(texts, 1024)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class TestCorpus:
    def test_answers_are_haiku_with_their_word(self, chats):
        haiku = [t for c in chats for t in c.turns if "\n" in t.answer]
        assert len(haiku) > 4000
        for turn in haiku:
            lines = turn.answer.split("\n")
            assert len(lines) == 3 and all(lines)
            assert turn.word is None or turn.word in turn.answer
            assert "{" not in turn.user + turn.answer

    def test_every_word_stands_in_its_prompt(self, chats):
        for chat in chats:
            said = ""
            for turn in chat.turns:
                said += turn.user
                assert turn.word is None or turn.word in said

    def test_held_out_words_are_nowhere_in_training(self, chats):
        held_out = heldout_words()
        assert len(held_out) == len(set(held_out)) == 200
        for path in TEXT_DIR.iterdir():
            if path.name != "heldout.txt":
                assert words_of("\n".join(read_lines(path.name))).isdisjoint(held_out), path
        assert words_of("\n".join(c.render() for c in chats)).isdisjoint(held_out)

    def test_is_a_function_of_seed_and_shard(self, chats):
        def some(seed, shard):
            source = demo_corpus.word_source(["lan", "tern", "moo"])
            return list(demo_corpus.chats(seed, shard, 50, source))

        assert some(3, 0) == chats[:50]
        assert some(4, 0) != chats[:50] != some(3, 1)

    def test_lists_are_well_formed(self):
        for scene in demo_corpus.scenes():
            assert {kind: len(lines) for kind, lines in scene.lines.items()} == dict.fromkeys(
                "abc", 6
            )
        assert all(
            line.count("{w}") == 1 for lines in demo_corpus.slot_lines().values() for line in lines
        )

    def test_is_varied(self, chats):
        asked = {turn.word for chat in chats for turn in chat.turns}
        answers = [turn.answer for chat in chats for turn in chat.turns if turn.word]
        assert len(asked) > 3000
        assert len(set(answers)) > 0.95 * len(answers)
        assert {len(chat.turns) for chat in chats} >= {1, 2, 3, 5}


class TestTokenizer:
    def test_a_word_is_cut_alike_wherever_it_stands(self, vocabulary):
        tokenizer = Tokenizer(vocabulary)
        for word in heldout_words():
            alone = [tokenizer.token_bytes(i) for i in tokenizer.encode(word)]
            assert b"".join(alone) == word.encode()
            for before in ' "*\n':
                cut = [tokenizer.token_bytes(i) for i in tokenizer.encode(before + word)]
                mark = before.encode()
                assert cut in ([mark, *alone], [mark + alone[0], *alone[1:]]), word

    def test_has_the_size_asked_for(self, vocabulary):
        assert len(vocabulary.tokens) == 1024
        assert tuple(vocabulary.tokens[-3:]) == demo_tokenizer.SPECIAL_TOKENS

    def test_chats_are_rendered_as_the_template_does(self, chats, vocabulary):
        for chat in chats[:40]:
            if chat.system is None:
                continue
            messages = [{"role": "system", "content": chat.system}]
            for turn in chat.turns:
                messages.append({"role": "user", "content": turn.user})
                messages.append({"role": "assistant", "content": turn.answer})
            if chat.system == demo_corpus.DEFAULT_SYSTEM:
                del messages[0]  # the template puts it there
            rendered = render_chat(
                vocabulary.chat_templates["default"], messages, add_generation_prompt=False
            )
            assert rendered == chat.render()


class TestRows:
    def test_the_answers_are_what_is_trained(self, vocabulary):
        length = 300
        rows = demo_rows.build_shard(vocabulary, 0, length, 0)
        source = demo_corpus.word_source(demo_tokenizer.letter_pieces(vocabulary))
        tokenizer = Tokenizer(vocabulary)
        fitting = [
            chat
            for chat in demo_corpus.chats(0, 0, demo_rows.SHARD, source)
            if len(tokenizer.encode(chat.render())) < length
        ]
        expected = "".join(f"{t.answer}<|im_end|>" for chat in fitting for t in chat.turns)
        assert tokenizer.decode(rows.tokens[rows.answer].tolist(), skip_special=False) == expected
        assert rows.tokens.shape[1] == length
        assert not rows.answer[:, :4].any()

    def test_workers_do_not_change_them(self, vocabulary):
        built = demo_rows.build(vocabulary, 0, 1, 300, workers=1)
        shard = demo_rows.build_shard(vocabulary, 0, 300, 0)
        np.testing.assert_array_equal(built.tokens, shard.tokens)


def tiny_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        ffn_size=96,
        vocab_size=vocab_size,
        context_length=128,
        rope_theta=1e6,
        rms_eps=1e-6,
        tied=True,
    )


class TestTraining:
    def test_learning_rate_follows_the_steps_or_the_clock(self):
        train_demo = pytest.importorskip("tools.train_demo", reason="needs the extra 'train'")

        def rates(done, spent):
            return train_demo.learning_rates(1.0, done, 100, 1000, spent)

        assert rates(0, 0.0)[0] == pytest.approx(0.01) and rates(0, 0.0)[-1] > 0.9
        np.testing.assert_array_equal(rates(500, 0.2), rates(500, 0.4))
        np.testing.assert_allclose(rates(500, 0.9), rates(900, 0.1), rtol=1e-6)
        assert rates(300, 1.0)[0] == pytest.approx(0.02)

    def test_the_loss_is_that_of_the_engine(self, vocabulary):
        train_demo = pytest.importorskip("tools.train_demo", reason="needs the extra 'train'")
        config = tiny_config(len(vocabulary.tokens))
        params = {
            k: jnp.asarray(v) for k, v in train_demo.initial_parameters(config, seed=1).items()
        }
        rows = demo_rows.build_shard(vocabulary, 0, 101, 0)
        tokens, answer = rows.tokens[0].astype(np.int32), rows.answer[0]
        batch = tokens[None], answer[None]
        loss = jax.jit(lambda p: train_demo.answer_loss(config, p, batch))(params)

        logits = Engine(config, params).logits(tokens[:-1].tolist()).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        picked = logprobs[np.arange(100), tokens[1:]]
        assert float(loss) == pytest.approx(-picked[answer[1:]].mean(), rel=1e-5)

    def test_its_gradient_is_that_of_finite_differences(self, vocabulary):
        """Of rows longer than a page of the engine's cache."""
        train_demo = pytest.importorskip("tools.train_demo", reason="needs the extra 'train'")
        config = tiny_config(len(vocabulary.tokens))
        params = {
            k: jnp.asarray(v) for k, v in train_demo.initial_parameters(config, seed=1).items()
        }
        rows = demo_rows.build_shard(vocabulary, 0, 151, 0)
        batch = rows.tokens[:1].astype(np.int32), rows.answer[:1]
        loss = jax.jit(lambda p: train_demo.answer_loss(config, p, batch))
        gradient = jax.jit(jax.grad(loss))(params)
        length = np.sqrt(sum(float((g * g).sum()) for g in gradient.values()))
        step = 1e-2 / length
        there, back = (
            float(loss({k: params[k] + sign * step * gradient[k] for k in params}))
            for sign in (1, -1)
        )
        assert (there - back) / (2 * step) == pytest.approx(length**2, rel=1e-2)

    def test_the_file_holds_the_parameters(self, vocabulary, tmp_path):
        train_demo = pytest.importorskip("tools.train_demo", reason="needs the extra 'train'")
        config = tiny_config(len(vocabulary.tokens))
        params = train_demo.initial_parameters(config, seed=1)
        path = tmp_path / "tiny.gguf"
        demo_gguf.write(path, config, params, vocabulary)

        checkpoint = open_checkpoint(path)
        # The file holds it in float32.
        assert checkpoint.config.rms_eps == np.float32(config.rms_eps)
        assert dataclasses.replace(checkpoint.config, rms_eps=config.rms_eps) == config
        loaded = load_parameters(checkpoint, jnp.dtype(jnp.float32))
        assert loaded.keys() == params.keys()
        for name, value in params.items():
            if value.ndim > 1:
                kind = gguf.GGMLQuantizationType.Q8_0
                value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
        model = api.load(path, dtype="float32")
        assert model.tokenizer.encode("a haiku") == Tokenizer(vocabulary).encode("a haiku")


@pytest.fixture(scope="module")
def file():
    return gguf.GGUFReader(SHIPPED)


@pytest.fixture(scope="module")
def keys(file):
    return {name: field.contents() for name, field in file.fields.items()}


class TestShippedFile:
    def test_is_small(self):
        assert Path(SHIPPED).stat().st_size <= 4_000_000

    def test_is_a_qwen2_model(self, keys):
        assert keys["general.architecture"] == "qwen2"
        assert keys["general.license"] == "apache-2.0"
        assert keys["qwen2.rope.freq_base"] == 1e6
        assert keys["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        heads, kv_heads = (keys[f"qwen2.attention.head_count{x}"] for x in ("", "_kv"))
        assert heads // kv_heads > 1 and heads % kv_heads == 0

    def test_has_its_own_tokenizer(self, keys):
        tokens = keys["tokenizer.ggml.tokens"]
        assert 1000 <= len(tokens) <= 4000
        kinds = dict(zip(tokens, keys["tokenizer.ggml.token_type"], strict=True))
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
            assert kinds[token] == gguf.TokenType.CONTROL
        assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
        assert keys["tokenizer.ggml.model"] == "gpt2"
        assert keys["tokenizer.ggml.pre"] == "qwen2"
        assert "You are Qwen, created by Alibaba Cloud." in keys["tokenizer.chat_template"]

    def test_has_real_biases_and_a_tied_head(self, file):
        tensors = {tensor.name: tensor for tensor in file.tensors}
        assert "output.weight" not in tensors
        for letter in "qkv":
            assert np.std(tensors[f"blk.0.attn_{letter}.bias"].data) > 0.1


class TestShippedModel:
    words = heldout_words()[::10]

    def test_writes_haiku_with_words_it_never_saw(self):
        answers = evaluate(api.load(dtype="float32"), self.words)
        assert sum(a.verdict.good for a in answers) >= 0.95 * len(answers), answers

    @pytest.mark.parametrize("fault", ["no biases", "theta 1e4", "wrong groups"])
    def test_a_faulty_engine_does_not(self, fault):
        checkpoint = open_checkpoint(SHIPPED)
        config, tokenizer = checkpoint.config, read_tokenizer(checkpoint)
        params = dict(load_parameters(checkpoint, jnp.dtype(jnp.float32)))
        for name, value in params.items():
            if fault == "no biases" and name.endswith("bias"):
                params[name] = jnp.zeros_like(value)
            if fault == "wrong groups" and name.endswith("o_proj.weight"):
                # Query head n reads kv head n % K: the same as its output standing elsewhere.
                shape = (-1, config.num_kv_heads, config.group_size, config.head_dim)
                params[name] = value.reshape(shape).swapaxes(1, 2).reshape(value.shape)
        if fault == "theta 1e4":
            config = dataclasses.replace(config, rope_theta=1e4)
        engine = Engine(
            config, params, stop_ids=tokenizer.stop_ids, precision=lax.Precision.HIGHEST
        )
        answers = evaluate(api.Model(engine, tokenizer), self.words)
        assert sum(a.verdict.good for a in answers) < 0.5 * len(answers)


@pytest.mark.parametrize(
    ("text", "has_word", "three_lines"),
    [
        ("a fern at dawn\nb\nc", True, True),
        ("a\nFern\nc", True, True),
        ("a\nferns\nc", False, True),
        ("a\nb\nsilent", False, True),
        ("a fern\n\nb\n  \nc\n", True, True),
        ("a fern\nb", True, False),
        ("fern\nb\nc\nd", True, False),
        ("", False, False),
    ],
)
def test_score(text, has_word, three_lines):
    verdict = score("fern", text)
    assert (verdict.has_word, verdict.three_lines) == (has_word, three_lines)
    assert verdict.good == (has_word and three_lines)
    assert not score("fern", text, stopped=False).good
