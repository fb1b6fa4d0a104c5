"""lm-evaluation-harness' own command line, with our model in it; needs the extra `eval`.

    python -m qwen_jax.lm_eval --model qwen_jax --model_args model=my.gguf --tasks arc_easy

The harness knows the models of its own package and those that somebody has imported; a command of
its own, `lm_eval`, imports nothing of ours. Everything behind `python -m qwen_jax.lm_eval` is its.
"""

import sys
import traceback

from qwen_jax import interrupts
from qwen_jax.errors import UserError
from qwen_jax.experiments.harness_settings import check_installed

_WAYS_OUT = {
    "Tasks not found": "`python -m qwen_jax.lm_eval ls tasks` lists them, and --include_path names "
    "a directory with others",
    "Attempted to load model": "ours is --model qwen_jax",
}
"""How messages of the harness about its flags may begin, and what to do."""


def main() -> int:
    """Runs one command of lm_eval; returns 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        check_installed()
        from lm_eval.__main__ import cli_evaluate

        import qwen_jax.experiments.harness  # noqa: F401  Which registers the model.

        cli_evaluate()
    except (UserError, NotImplementedError) as error:
        # NotImplementedError: an implementation asked for by name can't serve a shape.
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if not _is_about_flags(error):
            raise
        ways = (way for words, way in _WAYS_OUT.items() if str(error).startswith(words))
        way = next(ways, "`python -m qwen_jax.lm_eval run --help` shows the flags")
        print(f"error: {str(error).rstrip('.')}; {way}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupts.EXIT_CODE
    return 0


def _is_about_flags(error: ValueError) -> bool:
    """Whether the harness raised it where it reads its flags, and not in the work for them."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return module.startswith(("lm_eval.config.", "lm_eval.api.registry"))


if __name__ == "__main__":
    sys.exit(main())
