"""Our model beside lm_eval's own `hf` model, on one checkpoint drawn afresh in every run.

Needs the extras `hf` and `eval`; QWEN_JAX_LIVE_SEED repeats a run (see test_parity_live).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
pytest.importorskip("lm_eval", reason="needs pip install '.[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qwen_jax.experiments.harness import Harness
from qwen_jax.recommended import Recommended
from qwen_jax.text.chat import CHATML_TEMPLATE
from tests.text import conftest as texts
from tests.tiny_checkpoints import random_parameters, tiny_config, write_hf

pytestmark = pytest.mark.live

(SEED,) = np.random.default_rng([int(os.environ["QWEN_JAX_LIVE_SEED"]), 16]).integers(2**31, size=1)
CONTEXT = 96
reference = texts.reference
"""A small tokenizer as Qwen's."""


@pytest.fixture(scope="module")
def models(
    reference: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Harness, HFLM]:
    directory = tmp_path_factory.mktemp("lm")
    reference.save(str(directory / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<|endoftext|>"}
    text = json.dumps(special | {"chat_template": CHATML_TEMPLATE})
    (directory / "tokenizer_config.json").write_text(text)
    # Rows of the embedding without a token, which we never choose, lm_eval's model may.
    tokens = reference.get_vocab_size(with_added_tokens=True)
    config = tiny_config(vocab_size=tokens, context_length=CONTEXT)
    write_hf(directory, config, random_parameters(config, int(SEED)), eos_token_id=None)
    # Both ends of Qwen's chat models, as their files name them; we end on both in any case.
    ends = [reference.token_to_id(end) for end in ("<|im_end|>", "<|endoftext|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    ours = Harness(str(directory), dtype="float32", batch_size=4)
    theirs = HFLM(str(directory), dtype="float32", device="cpu", batch_size=2)
    return ours, theirs


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, 0) for a in arguments]


PAIRS = [
    ("the moon", " over the river"),
    ("the moon ", "over the river"),
    ("the moon  \n ", "over"),
    ("", "the moon"),
    ("", " the moon"),
    ("Äpfel 我想在", " apple工作"),
    ("a<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ("q: 1 + 1\n\na:", " 2"),
    ("the moon over the river " * 12, "the moon"),
    ("don", "'t"),
]


def test_loglikelihood(models: tuple[Harness, HFLM]) -> None:
    ours, theirs = (
        m.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True) for m in models
    )
    np.testing.assert_allclose([p for p, _ in ours], [p for p, _ in theirs], rtol=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_loglikelihood_rolling(models: tuple[Harness, HFLM]) -> None:
    """Of texts of less than a context, of several windows, and of a length that just fits."""
    whole = "the moon over the river, Äpfel 我想在 and <|im_end|> again. "
    requests = instances("loglikelihood_rolling", ("the moon",), (whole,), (whole * 6,))
    ours, theirs = (m.loglikelihood_rolling(requests, disable_tqdm=True) for m in models)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_prefix_and_tokens(models: tuple[Harness, HFLM]) -> None:
    ours, theirs = models
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text in [text for pair in PAIRS for text in pair]:
        assert ours.tok_encode(text) == theirs.tok_encode(text)


CHATS = [
    ([("user", "Name a city")], True),
    ([("user", "Name a city"), ("assistant", "The city is")], False),
    (
        [
            ("system", "Be brief."),
            ("user", "1 + 1"),
            ("assistant", "the sum is 2"),
            ("user", "2 + 2"),
            ("assistant", "the sum is"),
        ],
        False,
    ),
]


@pytest.mark.parametrize(("chat", "opens"), CHATS)
def test_chats(models: tuple[Harness, HFLM], chat: list[tuple[str, str]], opens: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in chat]
    ours, theirs = (m.apply_chat_template(messages, add_generation_prompt=opens) for m in models)
    assert ours == theirs


SETTINGS: list[dict[str, Any]] = [
    {"until": ["\n"], "max_gen_toks": 12},
    {"until": [], "max_new_tokens": 5},
    {"until": [], "do_sample": False, "temperature": 1, "max_gen_toks": 12},
    {"until": ["e", "<|im_end|>"], "max_gen_toks": 12},
    {"until": "a", "max_gen_toks": 12, "num_beams": 1},
    {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0, "top_k": 1},
    {"until": [], "max_gen_toks": 12, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_texts(models: tuple[Harness, HFLM], settings: dict[str, Any]) -> None:
    # One at a time, as lm_eval's model pads shorter prompts, which moves float32's last bits.
    requests = instances(
        "generate_until",
        *((text, dict(settings)) for text in ("the moon", "q: 1 + 1\n\na:", "Äpfel 我想在")),
    )
    ours = models[0].generate_until(requests, disable_tqdm=True)
    theirs = [models[1].generate_until([r], disable_tqdm=True)[0] for r in requests]
    assert ours == theirs


def test_what_the_model_recommends(models: tuple[Harness, HFLM], caplog: Any) -> None:
    """Theirs follows generation_config.json always, and so a greedy text has its penalty.

    One so large that no token comes twice, unless it must.
    """
    ours, theirs = models
    values = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1e6}
    ours._model.recommended = Recommended("generation_config.json", values)
    follows = Harness(ours._model, generation_config="model")
    assert "repetition_penalty 1000000.0, which is followed where tasks say" in caplog.text
    requests = instances("generate_until", ("the moon", {"until": [], "max_gen_toks": 12}))
    theirs.model.generation_config.update(**values)
    try:
        found = theirs.generate_until(requests, disable_tqdm=True)
    finally:
        theirs.model.generation_config.update(do_sample=False, top_k=None, repetition_penalty=1.0)
    assert follows.generate_until(requests, disable_tqdm=True) == found
    penalties = [h._request(*requests[0].args).sampling.repetition_penalty for h in (follows, ours)]
    assert penalties == [1e6, 1]


def test_drawn_texts_differ_as_theirs(models: tuple[Harness, HFLM]) -> None:
    settings = {"until": [], "temperature": 1.0, "max_gen_toks": 8}
    for model in models:
        requests = instances("generate_until", *[("the moon", dict(settings))] * 3)
        assert len(set(model.generate_until(requests, disable_tqdm=True))) == 3


def test_a_task_with_examples(models: tuple[Harness, HFLM], tmp_path: Path) -> None:
    """The harness' whole way: examples as turns, a prefix of the answer, and metrics."""
    pytest.importorskip("datasets")
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f'{{"q": "{i} + 1", "a": "{i + 1}"}}\n' for i in range(5)))
    for kind in ("generate_until", "multiple_choice"):
        choices = 'doc_to_choice: ["1", "2", "3", "4", "5"]\n' if kind[0] == "m" else ""
        target = "{{(a | int) - 1}}" if kind[0] == "m" else "{{a}}"
        generation = "generation_kwargs: {until: ['\\n'], max_gen_toks: 6}\n" if not choices else ""
        metric = "acc" if choices else "exact_match"
        (tmp_path / f"{kind}.yaml").write_text(
            f"task: sums_{kind}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {data}\ntest_split: test\nfewshot_split: test\noutput_type: {kind}\n"
            f'doc_to_text: "{{{{q}}}} ="\ndoc_to_target: "{target}"\n{choices}{generation}'
            f'gen_prefix: "It is"\nmetric_list:\n  - metric: {metric}\n'
        )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        ours, theirs = (
            lm_eval.simple_evaluate(
                model=model,
                tasks=["sums_generate_until", "sums_multiple_choice"],
                num_fewshot=1,
                task_manager=manager,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                system_instruction="Add.",
                bootstrap_iters=0,
                limit=3,
            )["samples"]
            for model in models
        )
    for task in ours:
        for our, their in zip(ours[task], theirs[task], strict=True):
            assert our["arguments"] == their["arguments"]
            assert "assistant\nIt is" in our["arguments"][0][0]
            if "generate" in task:
                assert our["resps"] == their["resps"]
            else:
                scores = [[r[0][0] for r in sample["resps"]] for sample in (our, their)]
                np.testing.assert_allclose(*scores, rtol=1e-5)
