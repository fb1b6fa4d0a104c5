"""Text to token ids, put together from a checkpoint's own files with other people's libraries.

Nothing of `qwen_jax.text` has a part in it but the limits on what a file's template may do. Each
way to get Qwen2.5's text wrong is one setting of the pipeline.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from qwen_jax import regular_files
from qwen_jax.errors import UserError
from qwen_jax.text.chat import render_chat
from qwen_jax.weights.checkpoint import Checkpoint

# As they stand in the tokenizer.json of Qwen2.5 and GPT-2.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Qwen2.5's own, where a file has none.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba "
    "Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_ENDS = ("<|im_end|>", "<|endoftext|>")

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a pipeline does; the defaults are right for Qwen2.5.

    Attributes:
        pattern: of the pre-tokenizer.
        normalise: NFC first.
        special: `<|im_start|>` and its like become one id each.
        bos: text of a token put before everything.
        eos: text of a token put after everything.
        template: a chat goes through its template.
        default_system: the template's default system prompt stays.
        generation_prompt: the chat ends with the opening of the assistant's turn.
        prefix_space: a space is put before the text.
    """

    pattern: str = QWEN2
    normalise: bool = True
    special: bool = True
    bos: str = ""
    eos: str = ""
    template: bool = True
    default_system: bool = True
    generation_prompt: bool = True
    prefix_space: bool = False


class Pipeline:
    """The reference pipeline of one checkpoint.

    Args:
        ids: text of each token, in byte symbols, to its id.
        added: tokens matched as a whole.
        ends: ids the files name as ends of a text.
        template: the chat template, or None.
        prefix: ids that the files put before a text that is no chat.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        added: Sequence[AddedToken],
        ends: Sequence[int],
        template: str | None,
        special_tokens: Mapping[str, str],
        prefix: Sequence[int] = (),
    ):
        self.ids, self.template = ids, CHATML if template is None else template
        self._added, self._special_tokens, self._prefix = added, special_tokens, tuple(prefix)
        self._bpe = models.BPE(dict(ids), list(merges))
        self.size = max(ids.values()) + 1
        self.ends = tuple(dict.fromkeys([*ends, *(ids[end] for end in _ENDS if end in ids)]))
        self._front_end = functools.cache(self._make_front_end)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Pipeline":
        """Of an open checkpoint. Raises UserError where its tokenizer is missing or damaged."""
        if checkpoint.format == "gguf":
            return cls.from_gguf(checkpoint.metadata, str(checkpoint.path))
        return cls.from_hf(checkpoint.path)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> "Pipeline":
        """From a GGUF file's key-value pairs."""
        key = "tokenizer.ggml."
        try:
            tokens, kinds = list(metadata[key + "tokens"]), list(metadata[key + "token_type"])
            merges = [tuple(line.split(" ")) for line in metadata[key + "merges"]]
        except KeyError as error:
            raise UserError(
                f"{source}: the key {error.args[0]!r} is missing, so there is no tokenizer."
            ) from None
        while tokens and tokens[-1] == f"[PAD{len(tokens) - 1}]":  # rows no token has
            tokens.pop()
        named = {
            name: metadata[f"{key}{name}_token_id"]
            for name in ("bos", "eos", "eot", "eom", "padding")
            if 0 <= metadata.get(f"{key}{name}_token_id", -1) < len(tokens)
        }
        if not metadata.get(key + "add_bos_token"):
            named.pop("bos", None)
        roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
        special = {roles[name]: tokens[i] for name, i in named.items() if name in roles}
        return cls(
            {token: i for i, token in enumerate(tokens)},
            merges,
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, kinds, strict=False)
                if kind in (_CONTROL, _USER_DEFINED)
            ],
            [int(named[name]) for name in ("eos", "eot", "eom") if name in named],
            metadata.get("tokenizer.chat_template"),
            special,
            [named["bos"]] if "bos" in named else (),
        )

    @classmethod
    def from_hf(cls, directory: Path) -> "Pipeline":
        """From tokenizer.json (or vocab.json and merges.txt) and the files beside it."""
        path, vocab = directory / "tokenizer.json", directory / "vocab.json"
        fast = path.is_file()
        try:
            tokenizer = (
                tokenizers.Tokenizer.from_file(str(path))
                if fast
                else tokenizers.Tokenizer(
                    models.BPE.from_file(str(vocab), str(directory / "merges.txt"))
                )
            )
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{path if fast else vocab} is no tokenizer ({error}).") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        content = json.loads(tokenizer.to_str())
        config = _json(directory / "tokenizer_config.json")
        older = _json(directory / "added_tokens.json")
        entries = {str(i): {"content": token, "normalized": False} for token, i in older.items()}
        decoder = config.get("added_tokens_decoder", entries)
        tokenizer.add_tokens([AddedToken(**decoder[i]) for i in sorted(decoder, key=int)])
        template_file = directory / "chat_template.jinja"
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        if template_file.is_file():
            template = regular_files.read(template_file).decode()
        special = {
            name: token if isinstance(token, str) else token["content"]
            for name in ("bos_token", "eos_token", "pad_token")
            if (token := config.get(name))
        }
        tokenizer.add_special_tokens(list(special.values()))
        ids = tokenizer.get_vocab(with_added_tokens=True)
        value = _json(directory / "generation_config.json").get("eos_token_id") or []
        ends = set(value if isinstance(value, list) else [value]) & set(ids.values())
        adds_bos = not fast and config.get("add_bos_token") and "bos_token" in special
        named = [ids[special["eos_token"]]] if special.get("eos_token") in ids else []
        return cls(
            ids,
            [tuple(merge) for merge in content["model"]["merges"]],
            list(tokenizer.get_added_tokens_decoder().values()),
            named + sorted(ends),
            template,
            special,
            [ids[special["bos_token"]]] if adds_bos else tokenizer.encode("").ids,
        )

    def encode(
        self, prompt: str | Sequence[Message], settings: Settings | None = None
    ) -> tuple[int, ...]:
        """Ids of a text to be continued, or of a chat."""
        settings = settings or Settings()
        text = prompt if isinstance(prompt, str) else self._render(prompt, settings)
        if settings.prefix_space:
            text = " " + text
        front_end = self._front_end(settings.pattern, settings.normalise, settings.special)
        ids = front_end.encode(text, add_special_tokens=False).ids
        bos, eos = ([self.ids[t]] if t in self.ids else [] for t in (settings.bos, settings.eos))
        return (*bos, *(self._prefix if isinstance(prompt, str) else ()), *ids, *eos)

    def _render(self, messages: Sequence[Message], settings: Settings) -> str:
        if not settings.template:
            return "\n".join(message["content"] for message in messages)
        given = list(messages)
        drop = not settings.default_system and given[0]["role"] != "system"
        if drop:
            given.insert(0, {"role": "system", "content": _MARK})
        # A file's template may loop for ever: it is run here only once it has kept our limits.
        prompt = settings.generation_prompt
        render_chat(
            self.template,
            given,
            add_generation_prompt=prompt,
            special_tokens=self._special_tokens,
        )
        try:
            text = _compiled(self.template).render(
                messages=given, tools=None, add_generation_prompt=prompt, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template is none for plain jinja2 ({error}), so it can't be audited; "
                "audit texts without a chat."
            ) from None
        return _without_turn(text, _MARK) if drop else text

    def _make_front_end(self, pattern: str, normalise: bool, special: bool) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer(self._bpe)
        if normalise:
            made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if special:
            made.add_tokens(list(self._added))
        return made


_MARK = "qwen_jax audit: the system prompt"


def _without_turn(text: str, content: str) -> str:
    """A rendered chat without the turn that has this content."""
    at = text.find(content)
    if at < 0:
        return text
    start, end = text.rfind("<|im_start|>", 0, at), text.find("<|im_start|>", at)
    return text[: max(start, 0)] + (text[end:] if end >= 0 else "")


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """As transformers compiles chat templates (utils/chat_template_utils.py)."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(
        x, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(regular_files.read(path)) if path.is_file() else {}
