"""The exceptions a user may see."""

from qwen_jax.terminal import message


class UserError(Exception):
    """A problem with what the user gave us: a file, a field, a value, a flag.

    The message is one sentence that names the file, the field and the value, and
    says what to do. `run.py` prints it to stderr without a traceback and exits with
    code 2; from Python it is an ordinary exception. What it quotes from files may be long
    and hold anything, so it is cut, and control characters are spelt out.

    Attributes:
        field: of a request, where it is one alone that is wrong.
    """

    def __init__(self, text: str, *, field: str | None = None):
        super().__init__(message(text))
        self.field = field


class ContextFullError(UserError):
    """A prompt has more tokens than the model's context, or leaves no room for an answer."""

    def __init__(self, text: str, *, tokens: int, context: int):
        super().__init__(text)
        self.tokens, self.context = tokens, context
