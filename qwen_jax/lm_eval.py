"""lm-evaluation-harness' own command line, with our model in it; needs the extra `eval`.

    python -m qwen_jax.lm_eval --model qwen_jax --model_args model=my.gguf --tasks arc_easy

The harness knows the models of its own package and those that somebody has imported; a command of
its own, `lm_eval`, imports nothing of ours. Everything behind `python -m qwen_jax.lm_eval` is its.
"""

import sys

from qwen_jax.errors import UserError
from qwen_jax.experiments.harness_settings import check_installed


def main() -> int:
    """Runs one command of lm_eval; returns 0, or 2 after a sentence about bad input."""
    try:
        check_installed()
        from lm_eval.__main__ import cli_evaluate

        import qwen_jax.experiments.harness  # noqa: F401  Which registers the model.

        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
