"""The chat templates of a Hugging Face directory, by name."""

from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.regular_files import is_there
from qwen_jax.text.text_file import read_text

DEFAULT = "default"


def read(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Jinja sources: `chat_template` of tokenizer_config.json, and files, which hold over it.

    Files are chat_template.jinja, the default, and additional_chat_templates/NAME.jinja. As in
    transformers chat_template.json, which processors of images read, is none of them.

    Raises UserError where one is no text.
    """
    templates = _in_config(config.get("chat_template"), directory / "tokenizer_config.json")
    named = sorted(directory.glob("additional_chat_templates/*.jinja"))
    paths = {DEFAULT: directory / "chat_template.jinja"} | {path.stem: path for path in named}
    return templates | {name: read_text(path) for name, path in paths.items() if is_there(path)}


def _in_config(value: object, path: Path) -> dict[str, str]:
    """One template, or several as [{"name": …, "template": …}]."""
    entries = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value or []
    named = {
        entry["name"]: entry["template"]
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }
    if not isinstance(entries, list) or len(named) < len(entries):
        raise UserError(
            f"{path}: chat_template is {value!r:.80}, which is neither text nor a list of objects "
            "with different names and a template each; correct it."
        )
    return named
