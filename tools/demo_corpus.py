"""The training text of the bundled demo model: chats in which someone asks for a haiku.

Everything is made from the lists in `tools/demo_text/`, all written for this project, and is a
function of the seed alone. Most asked words are made up (`demo_words`), so that the model has
to copy its word from the prompt through attention and cannot know it by heart.
"""

import dataclasses
import functools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from qwen_jax.text.chat import DEFAULT_SYSTEM
from tools.demo_words import NUCLEI, ONSETS, WordSource, read_lines, syllables

DEFAULT_PROMPT = "Write a haiku that contains the word {w}."
QUESTION_ANSWER = "I only know how to write haiku. Shall I write one about {w}?"
ENDS = (".",) * 8 + ("",) * 4 + ("!", "?", ", please.", " please", ". Thank you.", ". Thanks!")


def sections(lines: Sequence[str]) -> dict[str, list[str]]:
    """Texts by kind, of lines "kind: text"."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        kind, text = line.split(": ", 1)
        found[kind].append(text)
    return dict(found)


@functools.cache
def wording() -> Mapping[str, list[str]]:
    """What people say, by kind."""
    return sections(read_lines("wording.txt"))


@functools.cache
def small_talk() -> list[tuple[list[str], str]]:
    """What else people say, and the answer to it."""
    pairs = (line.split(" => ") for line in read_lines("smalltalk.txt"))
    return [(said.split(", "), answer) for said, answer in pairs]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Lines that go together: `lines["a"]` open a haiku, "b" continue it, "c" close it."""

    words: tuple[str, ...]
    lines: Mapping[str, Sequence[str]]


@functools.cache
def scenes() -> list[Scene]:
    """All of them, in the order of the file."""
    lines = read_lines("scenes.txt")
    starts = [i for i, line in enumerate(lines) if line.startswith("[")]
    found = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        by_kind = sections(lines[start + 1 : end])
        words = tuple(by_kind.pop("words")[0].split())
        found.append(Scene(words, by_kind))
    return found


@functools.cache
def scene_of_word() -> dict[str, Scene]:
    return {word: scene for scene in scenes() for word in scene.words}


@functools.cache
def slot_lines() -> Mapping[str, list[str]]:
    """Lines with a place for the word: "b2" are middle lines that leave it two syllables."""
    return sections(read_lines("slots.txt"))


def word_source(pieces: Sequence[str] = ()) -> WordSource:
    """Words to ask for; without a tokenizer's pieces, as before its training, with sounds."""
    listed = [word for line in read_lines("words.txt") for word in line.split()]
    return WordSource([*listed, *scene_of_word()], pieces or f"{ONSETS} {NUCLEI}".split())


def _pick(rng: random.Random, options: Sequence[str], hint: int) -> str:
    """Mostly the option that `hint` names.

    Without a habit that hangs on the word's letters, greedy decoding would answer every word
    with the same few lines.
    """
    return options[hint % len(options)] if rng.random() < 0.6 else rng.choice(options)


def haiku(rng: random.Random, word: str | None) -> str:
    """Three lines; the word, as it was given, stands in one of them or, rarely, in two."""
    first, last = (ord(word[0]), ord(word[-1])) if word else (rng.randrange(64), 0)
    by_letter = scenes()[first % len(scenes())]
    scene = scene_of_word().get((word or "").lower(), by_letter)
    if rng.random() < 0.2:
        scene = rng.choice(scenes())
    row = (first + last) if rng.random() < 0.6 else rng.randrange(64)
    lines = {line: _pick(rng, scene.lines[line], row) for line in "abc"}
    if word:
        where = _pick(rng, "aabacbc", last) if rng.random() < 0.95 else "ac"
        for line in where:
            left = syllables(word)
            while f"{line}{left}" not in slot_lines():
                left -= 1
            slot = _pick(rng, slot_lines()[f"{line}{left}"], first + 3 * last)
            lines[line] = slot.replace("{w}", word)
    return "\n".join(lines.values())


def request(rng: random.Random, word: str, first: bool) -> str:
    """A way to ask for a haiku with the word; `first` in the chat, or a follow-up."""
    say = wording()
    kind = rng.random()
    if not first and kind < 0.6:
        form = rng.choice(say["follow_up"])
    elif kind < 0.15:
        form = DEFAULT_PROMPT
    elif kind < 0.35:
        form = rng.choice(say["request"])
    else:
        form = " ".join(rng.choice(say[part]) for part in ("opener", "form", "link"))
        if form.endswith(" a") and word[0].lower() in "aeiou":
            form += "n"
        form += " {w}" + rng.choice(ENDS)
    if rng.random() < 0.1:
        form = form.lower()
    if rng.random() < 0.1:
        form = f"{rng.choice(say['aside'])} {form}"
    if rng.random() < 0.1 and form.endswith((".", "!", "?")):
        form = f"{form} {rng.choice(say['aside'])}"
    return form.replace("{w}", rng.choice(say["quote"]).replace("{w}", word))


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer; `word` is what the answer must contain, if anything."""

    user: str
    answer: str
    word: str | None = None


@dataclasses.dataclass(frozen=True)
class Chat:
    """Turns, after a system prompt or none."""

    system: str | None
    turns: tuple[Turn, ...]

    def render(self) -> str:
        """The chat in ChatML, as the shipped chat template writes it."""
        parts = [("system", self.system)] if self.system is not None else []
        for turn in self.turns:
            parts += [("user", turn.user), ("assistant", turn.answer)]
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts)


def _turns(rng: random.Random, words: WordSource) -> Iterator[Turn]:
    say = wording()
    for i in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        kind = rng.random()
        if kind < 0.92:
            word = words.draw(rng)
            yield Turn(request(rng, word, first=i == 0), haiku(rng, word), word)
        elif kind < 0.94:
            yield Turn(rng.choice(say["free"]), haiku(rng, None))
        elif kind < 0.97:
            said, answer = rng.choice(small_talk())
            user = rng.choice(said)
            user = user.capitalize() if rng.random() < 0.7 else user
            yield Turn(user + rng.choice(("", ".", "!", "?")), answer)
        else:
            word = words.draw(rng)
            question = rng.choice(say["question"]).replace("{w}", word)
            yield Turn(question, QUESTION_ANSWER.replace("{w}", word), word)
            if rng.random() < 0.5:
                yield Turn(rng.choice(say["agreement"]), haiku(rng, word), word)


def chats(seed: int, shard: int, count: int, words: WordSource) -> Iterator[Chat]:
    """`count` chats; the same seed and shard always give the same ones."""
    rng = random.Random(f"{seed}/{shard}")
    for _ in range(count):
        kind = rng.random()
        system = rng.choice(wording()["system"]) if kind < 0.3 else DEFAULT_SYSTEM
        yield Chat(None if kind > 0.9 else system, tuple(_turns(rng, words)))
