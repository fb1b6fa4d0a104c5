"""Text: token ids, chat templates, and text as it streams. Imports neither jax nor jinja2."""

from qwen_jax.text.chat import render_chat
from qwen_jax.text.streaming import StopStrings, TextStream
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.text.vocabulary import Fim

__all__ = ["Fim", "StopStrings", "TextStream", "Tokenizer", "render_chat"]
