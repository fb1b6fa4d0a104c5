"""What is planted in log-probabilities is named, alone; clean engines raise no alarm."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special

import qwen_jax
from qwen_jax.accuracy.distribution.comparison import read_text
from qwen_jax.accuracy.logprobs.causes import LINES
from qwen_jax.accuracy.logprobs.paths import HEADS, Path, Rows, _nucleus, predict
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.accuracy.logprobs.search import Verdict, judge
from qwen_jax.accuracy.logprobs.twin import twin
from qwen_jax.accuracy.logprobs.yardstick import Yardstick
from qwen_jax.engine.sampling import Sampling
from qwen_jax.opening import open_model
from tests.accuracy import logprob_logs as logs
from tests.accuracy.logprob_logs import Row, hot, plain

Log = dict[str, Logged]
LENGTH, PROMPT = 60, 12
"""Tokens of a text, and of its prompt: with it and without one program serves."""


class Remembering(Yardstick):
    """Each text goes through the model once for all tests."""

    def rows(self, text: Logged, before: tuple[int, ...] = (), prompt: bool = True) -> Rows:
        key = text.whole.tobytes(), before, prompt
        if key not in KNOWN:
            KNOWN[key] = super().rows(text, before, prompt)
        found = KNOWN[key]
        blank = np.full(len(found.whole) - len(text.tokens), np.nan)
        return found._replace(logged=np.concatenate([blank, text.logprobs]))


KNOWN: dict[object, Rows] = {}


@dataclasses.dataclass
class Bench:
    yardstick: Remembering
    texts: list[tuple[np.ndarray, int]]
    logits: dict[str, list[np.ndarray]]

    def log(
        self, row: Row = plain, dtype: str = "float32", sampling: Sampling | None = None
    ) -> Log:
        return self.of(lambda z, ids, prompt: logs.values(z, ids, prompt, row), dtype, sampling)

    def of(
        self,
        values: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
        dtype: str = "float32",
        sampling: Sampling | None = None,
    ) -> Log:
        made = zip(self.texts, self.logits[dtype], strict=True)
        return {
            str(i): logs.logged(str(i), ids, prompt, values(z, ids, prompt), sampling)
            for i, ((ids, prompt), z) in enumerate(made)
        }

    def judge(self, log: Log) -> Verdict:
        return judge(log, self.yardstick, 0.0, lambda done, total: None)


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = qwen_jax.load(dtype="float32")
    models = {"float32": model, "bfloat16": twin(model)}

    # Texts that the model knows, so that nothing need be compiled to write some.
    sample = np.array(read_text(model)[: 3 * LENGTH])
    texts = [(ids, PROMPT) for ids in sample.reshape(3, LENGTH)]
    first = logs.logged("0", *texts[0], np.zeros(len(texts[0][0]) - texts[0][1]))
    made = Yardstick.of(model, models["bfloat16"], open_model(), first)
    logits = {name: [m.logits(ids.tolist()) for ids, _ in texts] for name, m in models.items()}
    return Bench(Remembering(**vars(made)), texts, logits)


PLANTED: dict[str, tuple[Row, tuple[str, ...]]] = {
    "temperature": (hot(0.7), ("temperature 0.7",)),
    "top-p": (logs.top_p(0.9), ("top_p 0.9",)),
    "top-k": (logs.top_k(20), ("top_k 20",)),
    "repetition": (logs.repetition(1.1), ("repetition_penalty 1.1",)),
    "frequency": (logs.frequency(0.5), ("frequency_penalty 0.5",)),
    "padding": (logs.padded(128), ("padded_vocabulary 128",)),
    "logits": (logs.logits_rounded(), ("logits_bfloat16",)),
    "logprobs": (logs.rounded(), ("logprobs_bfloat16",)),
    "log-softmax": (logs.stepwise, ("log_softmax_bfloat16",)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_one_planted_cause_is_named_alone(bench: Bench, name: str) -> None:
    row, causes = PLANTED[name]
    found = bench.judge(bench.log(row))
    assert (found.verdict, found.causes, found.level) == ("cause", causes, "float32")
    assert found.before.rms > 10 and found.after is not None and found.after.rms < 2
    # A token that never came twice is penalised once by either.
    twins = {("presence_penalty 0.5",), ("frequency_penalty 0.5",)}
    assert set(found.others) <= (twins if name == "frequency" else set())
    assert causes[0].split()[0] in LINES


def late(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
    return logs.values(z, ids, prompt - 1)[:-1]


def early(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
    return np.append(logs.values(z, ids, prompt)[1:], np.nan)


def unshifted(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
    return logs.values(z, ids, prompt, token=0)


@pytest.mark.parametrize(
    ("values", "cause"),
    [(late, "written_late"), (early, "written_early"), (unshifted, "labels_not_shifted")],
)
def test_values_at_other_tokens(bench: Bench, values: Callable, cause: str) -> None:
    found = bench.judge(bench.of(values))
    assert (found.verdict, found.causes, found.others) == ("cause", (cause,), ())


@pytest.mark.long
def test_another_context(bench: Bench) -> None:
    model = bench.yardstick.exact
    start = model.engine.spec.stop_ids[-1]

    def longer(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
        more = np.array([start, *ids])
        return logs.values(model.logits(more.tolist()), more, prompt + 1)

    def shorter(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
        own = ids[prompt:]
        return np.append(np.nan, logs.values(model.logits(own.tolist()), own, 1))

    assert bench.judge(bench.of(longer)).causes == (f"token_before {start}",)
    assert bench.judge(bench.of(shorter)).causes == ("prompt_dropped",)


@pytest.mark.long
def test_two_causes_together(bench: Bench) -> None:
    both = bench.judge(bench.log(logs.rounded(hot(0.8))))
    assert set(both.causes) == {"temperature 0.8", "logprobs_bfloat16"}
    declared = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    part = bench.judge(bench.log(hot(0.7, logs.top_p(0.8)), sampling=declared))
    assert part.causes == ("temperature 0.7", "top_p 0.8")


def test_clean_engines_raise_no_alarm(bench: Bench) -> None:
    same, narrow = bench.judge(bench.log()), bench.judge(bench.log(dtype="bfloat16"))
    assert (same.verdict, same.level, same.causes) == ("rounding", "float32", ())
    assert (narrow.verdict, narrow.level, narrow.causes) == ("rounding", "bfloat16", ())
    assert narrow.before.rms < 1.5


def in_float32(how: str) -> logs.Row:
    """A log-softmax with every step in float32, as engines write it."""

    def row(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
        x = z.astype(np.float32)
        shifted = x - x.max()
        total = np.exp(shifted).sum(dtype=np.float32)
        if how == "shifted":
            return shifted - np.log(total)
        return (
            x - (x.max() + np.log(total))
            if how == "normaliser"
            else np.log(np.exp(shifted) / total)
        )

    return row


@pytest.mark.parametrize("how", ["shifted", "normaliser", "logarithm"])
def test_a_log_softmax_in_float32_is_of_float32(bench: Bench, how: str) -> None:
    """Close to 0 nats its roundings are all the error there is."""
    log = bench.log(in_float32(how))
    near_zero = np.concatenate([text.logprobs for text in log.values()]) > -1e-3
    assert near_zero.sum() > 8
    found = bench.judge(log)
    assert (found.verdict, found.level, found.causes) == ("rounding", "float32", ())
    cast = {
        "logits": logs.logits_rounded(in_float32(how)),
        "logprobs": logs.rounded(in_float32(how)),
    }
    for name, casted in cast.items():
        assert bench.judge(bench.log(casted)).causes == (f"{name}_bfloat16",)


@pytest.mark.live
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_logs_are_of_what_they_were_computed_in(bench: Bench, attention: str) -> None:
    torch = pytest.importorskip("torch", reason="transformers computes it: pip install '.[hf]'")
    transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")

    def log(dtype: str, then: Callable = lambda z: z.float().log_softmax(-1)) -> Log:
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            open_model().path.parent,
            gguf_file=open_model().path.name,
            dtype=dtype,
            attn_implementation=attention,
        ).eval()
        made = {}
        for i, (ids, prompt) in enumerate(bench.texts):
            with torch.no_grad():
                values = then(hf(torch.tensor(ids[None])).logits[0, prompt - 1 : -1])
            own = values.gather(1, torch.tensor(ids[prompt:, None]))[:, 0].float().numpy()
            made[str(i)] = logs.logged(str(i), ids, prompt, own.astype(np.float64))
        return made

    for dtype, level in (
        ("float32", "float32"),
        ("float16", "float16 or TF32"),
        ("bfloat16", "bfloat16"),
    ):
        found = bench.judge(log(dtype))
        assert (found.verdict, found.level, found.causes) == ("rounding", level, ())
    logits = bench.judge(log("float32", lambda z: z.bfloat16().float().log_softmax(-1)))
    logprobs = bench.judge(log("float32", lambda z: z.log_softmax(-1).bfloat16()))
    assert (logits.causes, logprobs.causes) == (("logits_bfloat16",), ("logprobs_bfloat16",))


def test_a_coarser_arithmetic_than_the_lines_say_is_told(bench: Bench) -> None:
    for dtype, said in (("bfloat16", "float32"), ("bfloat16", "float16"), ("float32", "float32")):
        log = {
            name: dataclasses.replace(text, dtype=said)
            for name, text in bench.log(dtype=dtype).items()
        }
        found = bench.judge(log)
        assert (found.verdict, found.level) == ("rounding", dtype)
        assert found.declared == ("" if said == dtype else said)


@pytest.mark.long
def test_a_temperature_in_bfloat16_arithmetic(bench: Bench) -> None:
    found = bench.judge(bench.log(hot(0.7), dtype="bfloat16"))
    assert (found.verdict, found.causes, found.level) == ("cause", ("temperature 0.7",), "bfloat16")


def test_what_nothing_explains_is_not_named(bench: Bench) -> None:
    """Small noise of no shape, and another model's log-probabilities."""
    rng = np.random.default_rng(0)

    def noisy(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
        return logs.values(z, ids, prompt) - 0.2 * rng.random(len(ids) - prompt)

    def other(z: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
        return logs.values(z + rng.normal(size=z.shape), ids, prompt)

    for values in (noisy, other):
        found = bench.judge(bench.of(values))
        assert (found.verdict, found.causes) == ("unexplained", ())


def test_a_fault_of_one_text_is_located(bench: Bench) -> None:
    log = bench.log()
    wrong = log["1"].logprobs.copy()
    wrong[5:] -= 0.3
    found = bench.judge(log | {"1": dataclasses.replace(log["1"], logprobs=wrong)})
    place = len(log["1"].prompt or ()) + 5
    assert (found.verdict, found.causes) == ("unexplained", ())
    assert found.where == (
        f"in 1 of 3 texts alone ('1'), from position {place} on; all else is within rounding of "
        "float32"
    )


def test_without_prompts_nothing_is_judged(bench: Bench) -> None:
    log = {name: dataclasses.replace(text, prompt=None) for name, text in bench.log().items()}
    found = bench.judge(log)
    assert found.verdict == "not judged" and "prompts' ids are not in the log" in found.why


def test_penalties_are_those_of_the_sampler() -> None:
    import jax.numpy as jnp

    from pallas_kernels.sample_tokens.reference import penalise
    from pallas_kernels.sample_tokens.rows import Counts, settings

    rng = np.random.default_rng(1)
    whole, prompt = np.array([3, 5, 5, 7, 3, 9]), 2
    z = rng.normal(size=(1, 32)).astype(np.float32)
    generated = np.bincount(whole[prompt:5], minlength=32)[None]
    seen = np.array([[sum(1 << int(t) for t in set(whole[:5].tolist()))]], np.uint32)
    asked = settings(1, repetition=1.3, presence=0.4, frequency=0.2)
    right = np.asarray(penalise(jnp.asarray(z), asked, Counts(jnp.asarray(seen), generated)))[0]
    rows = Rows(z, np.zeros(1), whole, prompt, np.array([4]), np.zeros(6))
    path = Path(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
    found = predict(path, rows)
    expected = plain(right.astype(np.float64), whole, prompt)[9]
    assert abs(found.value[0] - expected) <= found.limit[0]


def test_decimals_that_a_log_keeps_are_rounding(bench: Bench) -> None:
    log = {
        name: dataclasses.replace(text, logprobs=text.logprobs.round(4))
        for name, text in bench.log().items()
    }
    found = judge(log, bench.yardstick, 0.5e-4, lambda done, total: None)
    assert (found.verdict, found.level) == ("rounding", "float32")


def test_a_twin_in_bfloat16_is_the_model_in_bfloat16(bench: Bench) -> None:
    """Bit for bit, though it has float32 parameters."""
    ids = bench.texts[0][0].tolist()
    loaded = qwen_jax.load(dtype="bfloat16")
    np.testing.assert_array_equal(bench.yardstick.rough.logits(ids), loaded.logits(ids))
    assert twin(qwen_jax.load(weights="packed")) is None


@pytest.mark.parametrize("tail", [0.5, 0.1, 1e-3, 1e-9])
def test_top_p_is_the_same_from_the_likeliest_tokens_and_from_all(tail: float) -> None:
    """Peaked rows end among the first thousand, flat ones further down; equal logits are cut."""
    rng = np.random.default_rng(5)
    vocab = 3 * HEADS[0]
    rows = [9 * rng.standard_normal(vocab), np.zeros(vocab), rng.integers(0, 4, vocab)]
    for x in (np.stack(rows), np.stack(rows[:1])):
        weights = scipy.special.softmax(x.astype(np.float64), axis=-1)
        found = _nucleus(x.astype(np.float64), weights, np.full(len(x), tail))
        for z, p, kept in zip(x, weights, found, strict=True):
            # Likeliest first, of equal ones the larger id, until all but the tail is there.
            order = sorted(range(vocab), key=lambda i, z=z: (-z[i], -i))
            before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
            edge = np.abs(before - (1 - tail)) < 1e-12
            right = np.zeros(vocab, bool)
            right[np.array(order)[before < 1 - tail]] = True
            assert (kept == right)[np.array(order)[~edge]].all()
