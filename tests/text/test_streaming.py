"""Pieces of text: whole characters, nothing lost, and stop strings cut wherever pieces end."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.text import StopStrings, TextStream, Tokenizer
from tests.text.conftest import FIM, SPECIAL

few = settings(deadline=None, max_examples=300)


def _pieces(tokenizer: Tokenizer, ids: list[int], chunk: int = 1) -> list[str]:
    stream = TextStream(tokenizer)
    pieces = [stream.feed(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return [*pieces, stream.finish()]


@given(ids=st.lists(st.integers(0, 388)), chunk=st.integers(1, 5))
@few
def test_pieces_make_the_text(ids: list[int], chunk: int, small: Tokenizer) -> None:
    assert "".join(_pieces(small, ids, chunk)) == small.decode(ids)


# UTF-8 is decided by bytes: ids of the 256 byte tokens reach every kind of malformed sequence.
interesting_bytes = st.sampled_from(
    b"a\x80\xbf\xc0\xc3\xe0\xa0\xe4\xbd\xed\xef\xf0\x90\x9f\xf4\xff"
)


@given(data=st.lists(interesting_bytes))
@few
def test_invalid_utf8(data: list[int], small: Tokenizer) -> None:
    by_bytes = {small.token_bytes(i): i for i in range(256)}
    ids = [by_bytes[bytes([byte])] for byte in data]
    assert "".join(_pieces(small, ids)) == bytes(data).decode("utf-8", errors="replace")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@few
def test_valid_text_has_no_replacement(text: str, small: Tokenizer) -> None:
    pieces = _pieces(small, small.encode(text, parse_special=False))
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""


def test_a_character_appears_when_it_is_whole(small: Tokenizer) -> None:
    ids = small.encode("\U0001f680", parse_special=False)
    *waiting, last, end = _pieces(small, ids)
    assert len(ids) > 1 and waiting == [""] * len(waiting)
    assert (last, end) == ("\U0001f680", "")


def test_half_a_character_at_the_end(small: Tokenizer) -> None:
    ids = small.encode("a\U0001f680", parse_special=False)[:-1]
    assert "".join(_pieces(small, ids)) == "a\ufffd"


def test_control_tokens_can_be_shown(small: Tokenizer) -> None:
    ids = small.encode("a<|im_end|>")
    assert "".join(_pieces(small, ids)) == "a"
    assert TextStream(small, skip_special=False).feed(ids) == "a<|im_end|>"


mixed = st.sampled_from("ab\n\u00e9\U0001f680") | st.sampled_from([*SPECIAL, *FIM])
mixed_texts = st.lists(mixed, max_size=12).map("".join)


@given(
    data=st.lists(st.integers(0, 394) | st.integers(384, 394), max_size=20),
    text=mixed_texts,
    stops=st.lists(mixed_texts | st.sampled_from(["<|", "|><|im", "d|>"]), max_size=3),
    hidden=st.sets(st.integers(0, 394), max_size=5),
    sizes=st.lists(st.integers(0, 5), max_size=10),
    form=st.sampled_from(["hf", "gguf"]),
)
@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stops_see_control_tokens_and_show_none(
    data: list[int],
    text: str,
    stops: list[str],
    hidden: set[int],
    sizes: list[int],
    form: str,
    coder: dict[str, Tokenizer],
) -> None:
    tokenizer = coder[form]
    ids, stops = [*data, *tokenizer.encode(text), *data], [stop for stop in stops if stop]
    seen = [
        (byte, tokenizer.decode([i]) != "" and i not in hidden)
        for i in ids
        for byte in tokenizer.token_bytes(i)
    ]
    whole = bytes(byte for byte, _ in seen)
    coded = [stop.encode() for stop in stops]
    ends = [(whole.find(s) + len(s), whole.find(s), s.decode()) for s in coded if s in whole]
    end = min(ends)[1] if ends else len(whole)
    expected = bytes(byte for byte, is_shown in seen[:end] if is_shown).decode(errors="replace")

    stream = TextStream(tokenizer, stops, hidden)
    pieces = [stream.feed(ids[at:to]) for at, to in _ranges(sizes, len(ids))]
    assert "".join([*pieces, stream.finish()]) == expected
    assert stream.stopped == bool(ends)


def _ranges(sizes: list[int], length: int) -> list[tuple[int, int]]:
    ends = [*itertools.accumulate(sizes), length]
    return list(itertools.pairwise([0, *(min(end, length) for end in ends)]))


def _cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


def _run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    shown = b"".join(matcher.feed(piece.encode()) for piece in pieces)
    return (shown + matcher.finish()).decode(), matcher.found


few_letters = st.text(st.sampled_from("ab\n"), max_size=30)
stop_string = st.text(st.sampled_from("ab\n"), min_size=1, max_size=5)
cuts = st.lists(st.integers(0, 6), max_size=20)


@given(text=few_letters, stop=stop_string, sizes=cuts)
@few
def test_one_stop_string_is_str_find(text: str, stop: str, sizes: list[int]) -> None:
    at = text.find(stop)
    expected = (text, None) if at < 0 else (text[:at], stop)
    assert _run([stop], _cut(text, sizes)) == expected


@given(text=few_letters, stops=st.lists(stop_string, max_size=4), sizes=cuts)
@few
def test_several_stop_strings(text: str, stops: list[str], sizes: list[int]) -> None:
    """The one complete first counts; of those that end together, the longest."""
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    expected = (text, None)
    if ends:
        _, start, stop = min(ends)
        expected = (text[:start], stop)
    assert _run(stops, _cut(text, sizes)) == expected


@given(text=few_letters, stops=st.lists(stop_string, max_size=4), sizes=cuts)
@few
def test_only_a_possible_beginning_is_held_back(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher, shown, fed = StopStrings(stops), "", ""
    for piece in _cut(text, sizes):
        shown, fed = shown + matcher.feed(piece.encode()).decode(), fed + piece
        if matcher.found is None:
            held = fed.removeprefix(shown)
            assert fed == shown + held
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_by_hand() -> None:
    matcher = StopStrings(["\nUser:", "</s>"])
    assert matcher.feed(b"Hello\nUs") == b"Hello"
    assert matcher.feed(b"ual") == b"\nUsual"
    assert matcher.feed(b" <") == b" "
    assert matcher.feed(b"/s> more") == b""
    assert matcher.found == "</s>"
    assert matcher.feed(b"ignored") == b"" and matcher.finish() == b""


@pytest.mark.parametrize("stops", ["", [""], ["a", 5], [None], 5, b"ab"])
def test_bad_stop_strings(stops: object) -> None:
    with pytest.raises(UserError, match=r"stop is .* must be a text that is not empty"):
        StopStrings(stops)  # type: ignore[arg-type]
