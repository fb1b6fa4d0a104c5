"""Text audit: the ids a program makes of texts and chats against a reference pipeline's.

The reference is put together from the checkpoint's own files (`text_pipeline`). Where ids differ,
each known way to get Qwen2.5's text wrong is planted in it, alone and in twos and threes, and the
fewest that give every id are named.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.accuracy.text.pipeline import GPT2, Message, Pipeline, Settings
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.reporting.table import Table
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint

Case = str | Sequence[Message]

CASES: dict[str, Case] = {
    "chat": [{"role": "user", "content": "Write a haiku about 1987."}],
    "chat with a system prompt": [
        {"role": "system", "content": "Answer in one line."},
        {"role": "user", "content": "How many cats are 33 cats?"},
    ],
    "chat of three turns": [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi. What's new?"},
        {"role": "user", "content": "I'VE 1,314 uses of x.method(_name)"},
    ],
    "digits": "In 1987, 12345 of 33 cats",
    "contractions": "I'm sure YOU'RE here; it'S ours, they'LL go",
    "code": "for (x in self.items)\n\n\treturn[x.method(_name)];\r\n}",
    "decomposed letters": "Vie\u0323\u0302t e\u0301t u\u0308ber \u1112\u1161\u11ab",
    "white space": "  def f(x):\n\n\t\treturn x  +  1\r\n\r\n   ",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "letters": "(naïve) _snake_case Äpfel 我想在apple工作 😁",
}
"""Texts to be continued, and chats; each shows some fault."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextFault:
    """A way to get text wrong, as a setting of the reference pipeline.

    Attributes:
        line: what happened, in words for a reader.
        change: settings that differ from the right ones.
        reference: row of the catalogue of known faults, where it has one.
    """

    name: str
    line: str
    change: dict[str, Any]
    reference: str = ""


FAULTS = (
    TextFault(
        "bos-prepended",
        "<|endoftext|> stands before the text, and Qwen2.5 has no BOS",
        {"bos": "<|endoftext|>"},
        "29",
    ),
    TextFault(
        "im-start-prepended",
        "<|im_start|> stands before the text as if it were a BOS",
        {"bos": "<|im_start|>"},
        "29",
    ),
    TextFault("eos-appended", "<|endoftext|> stands after the text", {"eos": "<|endoftext|>"}),
    TextFault(
        "special-tokens-split",
        "<|im_start|> and its like are spelt out by BPE instead of one id each",
        {"special": False},
        "30",
    ),
    TextFault(
        "template-ignored",
        "the messages went in without the chat template",
        {"template": False},
        "30",
    ),
    TextFault("gpt2-pre-tokenizer", "text is cut by GPT-2's pattern", {"pattern": GPT2}, "31"),
    TextFault(
        "system-prompt-dropped",
        "the template's default system prompt is left out",
        {"default_system": False},
        "32",
    ),
    TextFault(
        "generation-prompt-missing",
        "the assistant's turn is not opened",
        {"generation_prompt": False},
    ),
    TextFault("not-normalised", "no NFC before the tokenizer", {"normalise": False}),
    TextFault("prefix-space", "a space stands before the text", {"prefix_space": True}),
)


@dataclasses.dataclass(frozen=True)
class TextFinding:
    """One text, or the set of stop ids.

    Attributes:
        field: the case's name, or "stop ids".
        verdict: "same" or "fault".
        causes: faults which together give the candidate's ids, by name; of several sets that do,
            `others` has the rest; empty: unknown.
        position: the first token that differs.
        evidence: what differs, in words; empty where nothing does.
    """

    field: str
    verdict: str
    causes: tuple[str, ...] = ()
    others: tuple[tuple[str, ...], ...] = ()
    position: int | None = None
    evidence: str = ""


def audit_text(
    reference: Pipeline | Checkpoint | str | Path,
    candidate: Model | Mapping[str, Sequence[int]],
    *,
    cases: Mapping[str, Case] | None = None,
    stop_ids: Sequence[int] | None = None,
) -> list[TextFinding]:
    """Token ids of texts and chats, and the ids that end a text.

    Args:
        reference: the checkpoint whose files say what is right.
        candidate: our own pipeline, or somebody's ids by the case's name.
        cases: texts (to be continued) and chats; `CASES` by default.
        stop_ids: on which the candidate stops; not audited if None (a model's are its own).

    Raises:
        UserError: the candidate has a case that is not among `cases`, or none at all, or ids that
            are no integers.
    """
    given = {} if isinstance(candidate, Model) else dict(candidate)
    for name, ids in (given | {"the stop ids": stop_ids or ()}).items():
        if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in ids):
            raise UserError(f"ids must be integers, but those of {name!r} are {ids!r:.80}.")
    if not isinstance(reference, Pipeline | Checkpoint):
        reference = open_checkpoint(reference)
    pipeline = Pipeline.of(reference) if isinstance(reference, Checkpoint) else reference
    cases = CASES if cases is None else cases
    if isinstance(candidate, Model):
        stop_ids = candidate.engine.spec.stop_ids if stop_ids is None else stop_ids
        held = {name: tuple(_own(candidate, case)) for name, case in cases.items()}
    else:
        held = {name: tuple(map(int, ids)) for name, ids in given.items()}
    if unknown := [name for name in held if name not in cases]:
        raise UserError(
            f"there is no text {unknown[0]!r} to compare ids of; name one of {', '.join(cases)}, "
            "or give the texts too."
        )
    if not held and stop_ids is None:
        raise UserError("there are no token ids to audit; give those of one text at least.")
    findings = _Texts(pipeline, {name: cases[name] for name in held}, held).findings()
    return findings + ([] if stop_ids is None else [_stop_finding(pipeline, stop_ids)])


def text_table(findings: Sequence[TextFinding]) -> Table:
    """What differs, a text a row; a caption alone where nothing does."""
    wrong = [f for f in findings if f.verdict == "fault"]
    summary = f"text: {len(findings)} checks, {len(findings) - len(wrong)} the same"
    if wrong:
        summary += f", {len(wrong)} fault"
    lines = {fault.name: fault.line for fault in FAULTS} | {
        "eos-missing": "it would not stop there"
    }
    rows = []
    for finding in wrong:
        cause = " + ".join(finding.causes) or "unknown"
        cause += "".join(f" or {' + '.join(other)}" for other in finding.others)
        what = [lines[name] for name in finding.causes if name in lines]
        rows.append((finding.field, cause, "; ".join([*what, finding.evidence])))
    return Table(("text", "cause", "what"), rows, caption=summary)


def _own(model: Model, case: Case) -> list[int]:
    return model.tokens(case, raw=isinstance(case, str))


class _Texts:
    def __init__(
        self,
        pipeline: Pipeline,
        cases: Mapping[str, Case],
        held: Mapping[str, tuple[int, ...]],
    ):
        self.pipeline, self.cases, self.held = pipeline, cases, held
        self.planted = functools.cache(self._planted)

    def _planted(self, name: str, faults: tuple[TextFault, ...]) -> tuple[int, ...]:
        changes: dict[str, Any] = {}
        for fault in faults:
            changes |= fault.change
        return self.pipeline.encode(self.cases[name], dataclasses.replace(Settings(), **changes))

    def findings(self) -> list[TextFinding]:
        wrong = [name for name, ids in self.held.items() if ids != self.planted(name, ())]
        together = self._explain(list(self.held)) if wrong else []
        out = []
        for name in self.held:
            if name not in wrong:
                out.append(TextFinding(name, "same"))
                continue
            # One set of faults for all texts is the better explanation; else each for itself.
            sets = [self._that_matter(name, s) for s in together] or self._explain([name])
            sets = list(dict.fromkeys(sets))
            position, evidence = self._where(name)
            first, *others = sets or [()]
            out.append(TextFinding(name, "fault", first, tuple(others), position, evidence))
        return out

    def _explain(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The smallest sets of faults that give the candidate's ids of all these texts."""
        for size in (1, 2, 3):
            found = [
                faults
                for faults in itertools.combinations(FAULTS, size)
                if len({key for fault in faults for key in fault.change}) == size
                and all(self.planted(name, faults) == self.held[name] for name in names)
            ]
            if found:
                return [tuple(fault.name for fault in faults) for faults in found]
        return []

    def _that_matter(self, name: str, faults: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a set without which this text's ids would be others."""
        known = {fault.name: fault for fault in FAULTS}
        kept = tuple(known[fault] for fault in faults)
        return (
            tuple(
                fault.name
                for fault in kept
                if self.planted(name, tuple(f for f in kept if f is not fault)) != self.held[name]
            )
            or faults
        )

    def _where(self, name: str) -> tuple[int, str]:
        held, right = self.held[name], self.planted(name, ())
        pairs = itertools.zip_longest(held, right)
        at = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        evidence = f"{len(held)} tokens, not {len(right)}; from token {at}: {_some(held, at)}"
        evidence += f", not {_some(right, at)}"
        if outside := [i for i in held if not 0 <= i < self.pipeline.size]:
            evidence += f"; {outside[0]} is no token, only 0 to {self.pipeline.size - 1}"
        return at, evidence


def _some(ids: Sequence[int], at: int) -> str:
    part = ids[at : at + 4]
    return f"{list(part)}{'...' if at + 4 < len(ids) else ''}" if part else "nothing"


def _stop_finding(pipeline: Pipeline, stop_ids: Sequence[int]) -> TextFinding:
    texts = {i: text for text, i in pipeline.ids.items()}

    def named(ids: set[int]) -> str:
        return ", ".join(f"{i} {texts.get(i, '(no token)')}" for i in sorted(ids))

    missing, extra = set(pipeline.ends) - set(stop_ids), set(stop_ids) - set(pipeline.ends)
    if not missing and not extra:
        return TextFinding("stop ids", "same")
    causes = (["eos-missing"] if missing else []) + (["eos-extra"] if extra else [])
    evidence = [f"missing: {named(missing)}"] if missing else []
    evidence += [f"no end of a text: {named(extra)}"] if extra else []
    return TextFinding("stop ids", "fault", tuple(causes), (), None, "; ".join(evidence))
