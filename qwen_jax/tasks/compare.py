"""`run.py compare`: the accuracy laboratory, from a config to a report."""

import dataclasses
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from qwen_jax import api, opening, pins, prompts, regular_files, xla_flags
from qwen_jax.accuracy import gates, report
from qwen_jax.accuracy.api import judged, quantised
from qwen_jax.accuracy.beside import Beside
from qwen_jax.accuracy.cache.audit import CacheAudit
from qwen_jax.accuracy.compiler import probe
from qwen_jax.accuracy.distribution import comparison as distribution
from qwen_jax.accuracy.distribution.base_file import SavedBase
from qwen_jax.accuracy.inside.audit import audit_inside, check_device, numbers_of_rows
from qwen_jax.accuracy.logprobs.audit import Judge, compare_logs
from qwen_jax.accuracy.logprobs.twin import twin
from qwen_jax.accuracy.machine import audit_machine
from qwen_jax.accuracy.report import Report
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.faults.fault import parse as parse_faults
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.tensors.precision_search import search_precision
from qwen_jax.accuracy.text.audit import audit_text
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.reporting.model import described
from qwen_jax.reporting.origin import Origin
from qwen_jax.settings import Command, asked
from qwen_jax.tasks.compare_checks import BASE, PARTS, check, two_logs, types_of
from qwen_jax.tasks.dumps import bar, token_ids
from qwen_jax.tasks.generate import load
from qwen_jax.terminal import visible
from qwen_jax.weights.loader import Checkpoint

NOT_AUDITED = "The part weights is left out: adapters change what it would hold against the file."


def run(command: Command) -> int:
    """Prints the report and writes it into the workdir; 1 where a gate fails."""
    config, settings = command.config, command.config.compare
    limits = gates.parse(settings.fail_if or "")
    parts = () if settings.save_base or settings.list_faults else _parts(config)
    check(config, command.overrides, parts)
    if settings.list_faults:
        _list_faults()
        return 0
    pins.pin_and_tell(config, pins.OF_COMPARE)
    compiler = probe()
    if compiler.wrong:
        logging.warning("The compiler can't be trusted here: %s.%s", compiler, _way_out())
    if settings.save_base is not None:
        return _save_base(config)
    if config.workdir is not None:
        report.prepare(config.workdir)
    if settings.logprobs is not None:
        found = _of_logs(config, "model" in asked(config, command.overrides))
    elif "quantisation" in parts:
        found = _of_files(config)
    else:
        found = _of_dump(config, parts) if settings.candidate else _of_engine(config, parts)
    found = dataclasses.replace(found, compiler=compiler, origin=Origin.now(command.typed))
    outcomes = gates.check(limits, report.values(found))
    found = dataclasses.replace(found, gates=outcomes)
    print(visible(report.text(found)), end="")
    if config.workdir is not None:
        for path in report.write(config.workdir, found):
            print(f"wrote {path}", file=sys.stderr)
    return int(any(outcome.failed for outcome in outcomes))


def _way_out() -> str:
    """What to do about the flag that is known to help, where it is not in force."""
    if f"{xla_flags.REDUCTIONS}=-reduce" in os.environ.get("XLA_FLAGS", ""):
        return " Take another version of JAX."
    return f" Start with XLA_FLAGS={xla_flags.REDUCTIONS}=-reduce, or take another version of JAX."


def _list_faults() -> None:
    for fault in FAULTS.values():
        report_of = f" ({fault.report})" if fault.report else ""
        print(f"{fault.name:<28} {', '.join(fault.operations)}\n    {fault.line}{report_of}")


def _parts(config: ConfigDict) -> tuple[str, ...]:
    """What to run: all that is asked for, or what fits the candidate."""
    settings = config.compare
    if settings.parts is not None:
        parts = tuple(part.strip() for part in settings.parts.split(","))
        for part in parts:
            if part not in PARTS:
                raise UserError(f"parts has {part!r}, but the parts are {', '.join(PARTS)}.")
        return parts
    if settings.logprobs is not None:
        return ("logprobs",)
    if any(settings.base[name] is not None for name in ("file", *BASE)):
        return ("distribution",)
    if settings.candidate:
        return ("tensors", "text")
    # Adapters change the weights that the audit would hold against their file: see NOT_AUDITED.
    weights = () if config.adapter else ("weights",)
    return ("tensors", *weights) if settings.plant else ("tensors", *weights, "text", "cache")


def _of_dump(config: ConfigDict, parts: tuple[str, ...]) -> Report:
    """A trace or a dump that is there already; nothing is run but the references."""
    settings = config.compare
    if beside := set(parts) - {"tensors", "text"}:
        raise UserError(
            f"The candidate {settings.candidate} is a trace, which has no {min(beside)}; the parts "
            "for it are tensors and text."
        )
    if settings.parts is not None and "text" in parts and config.prompt is None:
        raise UserError("The part text needs --prompt, the message whose token ids the trace has.")
    checkpoint = opening.open_model(config.model, config.adapter, sha256=config.sha256)
    trace = open_trace(settings.candidate, checkpoint.config, tokens=token_ids(settings.tokens))
    found = Report(candidate=trace.header, model=described(checkpoint))
    if "tensors" in parts:
        found = _with_tensors(found, config, checkpoint, trace)
    if "text" in parts and config.prompt is not None:
        options = prompts.options_of(config)
        if options["suffix"] is not None or options["tools"] is not None:
            raise UserError(
                "The part text audits chats and plain texts; drop --suffix and --tools."
            )
        item = prompts.single(config, options)
        case = item.prompt
        if isinstance(case, str) and not config.raw:
            system = [{"role": "system", "content": config.system}] if config.system else []
            case = [*system, {"role": "user", "content": case}]
        audited = audit_text(checkpoint, {"prompt": trace.header.tokens}, cases={"prompt": case})
        found = dataclasses.replace(found, text=audited)
    return found


def _of_logs(config: ConfigDict, with_model: bool) -> Report:
    """Two engines' log-probabilities; the model that they are of explains them, if it is named."""
    a, b = two_logs(config.compare.logprobs)
    judge = None
    if with_model:
        checkpoint = opening.open_model(config.model, config.adapter, sha256=config.sha256)
        exact = _in_dtype(config, "float32")
        judge = Judge(exact, twin(exact) or _in_dtype(config, "bfloat16"), checkpoint)
    with bar("log-probabilities") as progress:
        return Report(logprobs=compare_logs(a, b, judge, progress=progress))


def _in_dtype(config: ConfigDict, dtype: str) -> Model:
    other = ConfigDict(config)
    other.update(dtype=dtype, matmul_precision="highest")
    return load(other)


def _of_files(config: ConfigDict) -> Report:
    """A quantised file beside its base."""
    settings = config.compare
    with bar("quantisation") as progress:
        return quantised(
            opening.open_model(config.model, sha256=config.sha256),
            opening.open_model(settings.base.model),
            settings.text,
            context=settings.context,
            upgrades=types_of(settings.upgrades),
            passes=settings.passes,
            implementation=config.implementation,
            progress=progress,
        )


def _of_engine(config: ConfigDict, parts: tuple[str, ...]) -> Report:
    """This engine, as the config sets it, perhaps with faults in it."""
    settings = config.compare
    options = prompts.options_of(config)
    ids = token_ids(settings.tokens)
    if "inside" in parts:
        check_device()
    on_text = {"tensors", "inside"} & set(parts)
    item = prompts.single(config, options) if ids is None and on_text else None
    checkpoint = opening.open_model(config.model, config.adapter)
    faults = parse_faults(settings.plant or "", checkpoint.config)
    model = load(config)
    tokens = ids or (model.tokens(item.prompt, **api.prompt_options(options)) if item else None)
    found = Report(planted=tuple(map(str, faults)), model=described(checkpoint))
    more: dict[str, Any] = {}
    with planted(model.engine, faults) if faults else nullcontext(model.engine) as engine:
        with Beside(engine) as device:
            # What a device apart has to do begins first; parts that need nothing of it go before.
            cache = CacheAudit(engine) if "cache" in parts else None
            if "tensors" in parts and tokens is not None:
                prompt, recorder = max(1, len(tokens) - settings.decode_tokens), Recorder(engine)
                recorder.check(tokens, prompt)
                trace = device.begin(recorder.record, tokens, prompt_length=prompt)
            if cache is not None:
                cache.begin(device)
            if "weights" in parts:
                with bar("weights") as progress:
                    audit = device.elsewhere(audit_weights)
                    more["weights"] = audit(checkpoint, device.parameters, progress=progress)
            if "text" in parts:
                more["text"] = audit_text(checkpoint, model)
            if "tensors" in parts and tokens is not None:
                found = _with_tensors(found, config, checkpoint, trace())
            # Before the engine's own cache takes the memory that is left.
            if "inside" in parts and tokens is not None:
                with bar("inside") as progress:
                    rows, layers = numbers_of_rows(settings.inside.rows), settings.inside.layers
                    more["inside"] = audit_inside(engine, tokens, rows, layers, progress)
            if cache is not None:
                with bar("truths of the cache") as progress:
                    cache.work_out(progress)
                with bar("cache") as progress:
                    more["cache"] = cache.findings(progress)
                del cache  # its truths take half a gigabyte
        if "machine" in parts:
            with bar("machine") as progress:
                more["machine"] = audit_machine(engine, progress)
        wrong = Model(engine, model.tokenizer) if faults else model
        if "distribution" in parts:
            more["distribution"] = _distribution(config, wrong)
        if "precision" in parts:
            more["precision"] = search_precision(
                wrong,
                distribution.read_text(model, settings.text)[: settings.context],
                settings.precision_kld,
                dtype=settings.precision_dtype,
            )
    return dataclasses.replace(found, **more)


def _with_tensors(
    found: Report, config: ConfigDict, checkpoint: Checkpoint, trace: Trace
) -> Report:
    """Replay, diagnosis and the comparison with the reference."""
    with bar("replay") as progress:
        of_trace = judged(trace, checkpoint, config.compare.reference, progress)
    left_out = [NOT_AUDITED] if config.adapter and config.compare.parts is None else []
    return dataclasses.replace(
        found,
        candidate=of_trace.candidate,
        diagnosis=of_trace.diagnosis,
        comparison=of_trace.comparison,
        notes=(*of_trace.notes, *left_out),
    )


def _distribution(config: ConfigDict, model: Model) -> distribution.Distribution:
    settings = config.compare
    changes = {name: settings.base[name] for name in BASE if settings.base[name] is not None}
    if settings.base.file is not None:
        base: Model | SavedBase = SavedBase(settings.base.file)
        tokens = None if settings.text is None else distribution.read_text(model, settings.text)
        return distribution.compare_distributions(model, base, tokens)
    other = ConfigDict(config)
    other.update_from_flattened_dict(changes)
    if "model" in changes:  # adapters are for one model
        other.adapter = ()
    tokens = distribution.read_text(model, settings.text)
    names = (_describe(config), _describe(other))
    return distribution.compare_distributions(
        model, load(other), tokens, context=settings.context, names=names
    )


def _describe(config: ConfigDict) -> str:
    weights = () if config.weights == "auto" else (config.weights,)
    return " ".join((config.model, *config.adapter, config.dtype, *weights, config.implementation))


def _save_base(config: ConfigDict) -> int:
    settings = config.compare
    path = Path(settings.save_base)
    if why := regular_files.why_taken(path, "base.safetensors"):
        raise UserError(f"--save_base={path} {why}")
    model = load(config)
    tokens = distribution.read_text(model, settings.text)
    distribution.save_base(path, model, tokens, context=settings.context)
    print(f"wrote {path}", file=sys.stderr)
    return 0
