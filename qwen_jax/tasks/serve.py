"""`run.py serve`: the model behind HTTP, as OpenAI's API has it."""

import re
import sys
from pathlib import Path

from ml_collections import ConfigDict

from qwen_jax import in_force, interrupts, pins, prompts, recommended, settings, startup
from qwen_jax.options import Options
from qwen_jax.serving import listening
from qwen_jax.serving.limits import Key, Limits
from qwen_jax.settings import Command
from qwen_jax.tasks.generate import load
from qwen_jax.terminal import one_line
from qwen_jax.text import constraint, matching


def run(command: Command) -> int:
    """Serves until it is told to end; returns the exit code."""
    listening.check_installed()
    from qwen_jax.serving.app import Server

    config = command.config
    serve = dict(config.serve)
    name, key_file = serve.pop("model_name"), serve.pop("api_key_file")
    limits = Limits(**serve)
    key = None if key_file is None else Key.in_file(key_file)
    prompts.options_of(config)  # What is wrong is told before anything is loaded.
    with listening.bound(limits) as listener:
        pins.pin_and_tell(config, pins.OF_RUN)
        with startup.timed("load"):
            model = load(config)
        with startup.timed("compile"):  # so that no caller waits for it
            constrained = constraint.is_installed()
            if constrained:
                matching.ready(model.tokenizer)
            model.engine.compile(constrained=constrained)
        asked = settings.asked(config, command.overrides)
        config = recommended.resolved(config, model.recommended, asked)
        sampling = prompts.sampling_of(config)
        if said := recommended.line(model.recommended, config, sampling):
            print(one_line(said), file=sys.stderr)
        defaults = Options(max_tokens=config.max_tokens, sampling=sampling)
        server = Server(model, name or _name(config), defaults, limits, key)
        if key is None and not limits.is_loopback:
            print("Anyone who reaches this address may ask: see --api_key_file.", file=sys.stderr)
        begun = f"{server.name} at {listening.address(listener)}"
        how = f"{in_force.describe(sampling, drawn=True)} unless a request says otherwise"
        print(one_line(f"{begun}, {how}; Ctrl-C ends it."), file=sys.stderr, flush=True)
        answered = listening.serve(server.app, listener, limits)
    return 0 if answered else interrupts.EXIT_CODE


def _name(config: ConfigDict) -> str:
    """What callers call the model: no path of this machine."""
    if config.model.startswith("hf:"):
        return str(config.model.removeprefix("hf:"))
    return re.sub(r"\.gguf$", "", Path(config.model).resolve().name)
