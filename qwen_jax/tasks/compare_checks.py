"""What can be known to be wrong with a comparison before a model is loaded for it."""

from collections.abc import Collection

from ml_collections import ConfigDict

from qwen_jax import choices, flag_fields, regular_files, settings, task_fields
from qwen_jax.accuracy import gates, references
from qwen_jax.accuracy.distribution import comparison as distribution
from qwen_jax.accuracy.distribution.base_file import SavedBase
from qwen_jax.accuracy.inside.audit import numbers_of_rows
from qwen_jax.accuracy.quantisation import lens
from qwen_jax.accuracy.tensors.precision_search import DTYPES
from qwen_jax.accuracy.traces.recording import bounds
from qwen_jax.errors import UserError
from qwen_jax.mesh import MeshShape
from qwen_jax.opening import locate
from qwen_jax.weights.hub_names import is_hub_name

PARTS = tuple(gates.MEASURED)
BASE = ("model", "dtype", "weights", "implementation", "matmul_precision")

_FILE = ("model", "adapter", "sha256")
_ENGINE = (
    *("mesh", "dtype", "weights", "implementation", "matmul_precision", "slots"),
    *("batch_invariant", "compare.plant", "compare.fail_if", "compare.parts", "workdir"),
)
_DUMP = ("compare.candidate", "compare.tokens", "compare.fail_if", "compare.parts", "workdir")
_PAIR = ("model", "sha256", "implementation", "compare.fail_if", "compare.parts", "workdir")
_LOGS = ("compare.logprobs", "compare.fail_if", "compare.parts", "workdir")
_PROMPT = ("prompt", "system", "raw", "suffix", "tools", "continue_final_message")
_WINDOWS = ("compare.text", "compare.context")
_READ_BY: dict[str, tuple[str, ...]] = {
    "tensors": (*_PROMPT, "compare.tokens", "compare.decode_tokens", "compare.reference"),
    "weights": (),
    "text": (),
    "cache": (),
    "distribution": (*_WINDOWS, "compare.base"),
    "precision": (*_WINDOWS, "compare.precision_kld", "compare.precision_dtype"),
    "machine": (),
    "inside": (*_PROMPT, "compare.tokens", "compare.inside"),
    "quantisation": (*_WINDOWS, "compare.base.model", "compare.passes", "compare.upgrades"),
    "logprobs": (),
}
"""Fields that a part alone reads, or groups of them."""


def check(config: ConfigDict, overrides: Collection[str], parts: tuple[str, ...]) -> None:
    """Raises UserError for settings that contradict one another or that nothing reads, gates on
    what no part measures, and files that can't be read.

    Args:
        overrides: fields that flags set, perhaps to their defaults.
        parts: what is to be compared.
    """
    compare = config.compare
    _check_logs(compare, parts)
    if "quantisation" in parts:
        _check_quantisation(compare, parts)
    _check_effect(settings.asked(config, overrides), config, parts)
    _check_mesh(config.mesh, parts)
    measured = {name for part in parts for name in gates.MEASURED[part]} | {*gates.ALWAYS}
    for gate in gates.parse(compare.fail_if or ""):
        if gate.metric not in measured:
            of = " and ".join(part for part in PARTS if gate.metric in gates.MEASURED[part])
            raise UserError(
                f"--fail_if={compare.fail_if!r:.80} needs {gate.metric}, which the part {of} "
                f"measures, but the parts are {', '.join(parts)}; set --parts."
            )
    if "tensors" in parts:
        references.check(compare.reference)
        if compare.decode_tokens < 0:
            raise UserError(
                f"compare.decode_tokens is {compare.decode_tokens}, but it must not be negative."
            )
    if "inside" in parts:
        numbers_of_rows(compare.inside.rows)
        bounds(compare.inside.layers, "layers of inside")
        if compare.plant:
            raise UserError(
                "--plant plants in the layer-by-layer decoder, and the part inside looks into the "
                "decode-step kernel; leave one of them out."
            )
    if "precision" in parts and not compare.precision_kld > 0:  # which NaN is not
        raise UserError(
            f"compare.precision_kld is {compare.precision_kld}, but it must be above 0."
        )
    if "precision" in parts and compare.precision_dtype not in DTYPES:
        raise UserError(
            f"precision_dtype is {compare.precision_dtype!r:.40}, but it must be one of "
            f"{', '.join(DTYPES)}."
        )
    if "precision" in parts or "distribution" in parts or compare.save_base is not None:
        distribution.check_context(compare.context)
        if compare.text is not None:
            _check_text(compare.text)
    if "distribution" in parts:
        _check_base(compare.base)


def _check_quantisation(compare: ConfigDict, parts: tuple[str, ...]) -> None:
    """Two files are held against each other, and no engine is run."""
    if beside := set(parts) - {"quantisation"}:
        raise UserError(
            f"The part quantisation holds two files against each other, and goes without "
            f"{min(beside)}; run that by itself."
        )
    if compare.base.model is None:
        raise UserError(
            "The part quantisation needs --base_model, the file that --model was made from."
        )
    if not is_hub_name(compare.base.model):
        locate(compare.base.model)
    if compare.text is not None:
        _check_text(compare.text)
    lens.check_passes(compare.passes)
    lens.check_upgrades(types_of(compare.upgrades))


def types_of(upgrades: str) -> tuple[str, ...]:
    """The types of `compare.upgrades`, which has commas between them."""
    return tuple(part.strip() for part in upgrades.split(","))


def _check_logs(compare: ConfigDict, parts: tuple[str, ...]) -> None:
    """Two logs go with a part of their own."""
    if compare.list_faults or compare.save_base is not None:
        return
    if compare.logprobs is None:
        if "logprobs" in parts:
            raise UserError("The part logprobs needs --logprobs=a.jsonl,b.jsonl.")
        return
    if beside := set(parts) - {"logprobs"}:
        raise UserError(
            f"--logprobs compares two logs, which have no {min(beside)}; the part for them is "
            "logprobs."
        )
    if compare.candidate is not None:
        raise UserError("--logprobs and --candidate are two comparisons; give one of them.")
    for path in two_logs(compare.logprobs):
        try:
            regular_files.opened(path).close()
        except OSError as error:
            raise UserError(
                f"--logprobs: {path} can't be read: {regular_files.why_not(error)}"
            ) from error


def two_logs(text: str) -> tuple[str, str]:
    """The files of `--logprobs=a,b`. Raises UserError where they are not two."""
    paths = [path for part in text.split(",") if (path := part.strip())]
    if len(paths) != 2:
        raise UserError(
            f"--logprobs={text:.80} names {len(paths)} files, but it takes two with a comma "
            "between them, as in a.jsonl,b.jsonl."
        )
    return paths[0], paths[1]


def _check_effect(asked: Collection[str], config: ConfigDict, parts: tuple[str, ...]) -> None:
    compare = config.compare
    read: tuple[str, ...]
    if compare.list_faults:
        read, doing = ("compare.list_faults",), "--list_faults"
    elif compare.save_base is not None:
        read, doing = (*_FILE, *_ENGINE[:7], *_WINDOWS, "compare.save_base"), "--save_base"
    elif compare.logprobs is not None:
        model = "model" in asked
        read = (*_LOGS, *((*_FILE, "mesh", "implementation", "slots") if model else ()))
        doing = "--logprobs" + " without --model" * (not model)
    elif "quantisation" in parts:
        read, doing = (*_PAIR, *_READ_BY["quantisation"]), "the part quantisation"
    else:
        doing = f"the parts {', '.join(parts)}"
        read = (*_FILE, *(_DUMP if compare.candidate else _ENGINE))
        read += tuple(field for part in parts for field in _READ_BY[part])
        if compare.candidate:
            read += _PROMPT * ("text" in parts)
            doing += " of a --candidate"
    for field in sorted(asked):
        if not task_fields.among(field, read):
            said = f"--{flag_fields.FLAG_OF[field]}" if field in flag_fields.FLAG_OF else field
            raise UserError(f"{said} does nothing for {doing}; leave it out.")


def _check_mesh(text: str | None, parts: tuple[str, ...]) -> None:
    """One model is looked at, on as many devices as have it together."""
    mesh = MeshShape.parse(text)
    if mesh.dp > 1:
        raise UserError(
            f"mesh is {mesh}, but compare looks at one model, and the others would do nothing; "
            "leave dp out."
        )
    if mesh.tp > 1 and "inside" in parts:
        raise UserError(
            f"mesh is {mesh}, but the part inside looks into the decode-step kernel of one device; "
            "leave one of them out."
        )


def _check_text(path: str) -> None:
    try:
        regular_files.opened(path).close()
    except OSError as error:
        raise UserError(f"--text={path} can't be read: {regular_files.why_not(error)}") from error


def _check_base(base: ConfigDict) -> None:
    changes = [name for name in BASE if base[name] is not None]
    if base.file is not None:
        if changes:
            raise UserError(f"The base is the file {base.file}; leave out its {min(changes)}.")
        SavedBase(base.file)  # Refuses what is none.
        return
    if not changes:
        raise UserError(
            "There is no base to compare with; give --base=FILE, or --base_dtype, --base_model, "
            "--base_weights or --base_implementation."
        )
    if base.model is not None and not is_hub_name(base.model):  # that is found when it is pinned
        locate(base.model)
    for name, check_value in (
        ("dtype", choices.dtype_of),
        ("weights", choices.check_weights),
        ("implementation", choices.check_implementation),
        ("matmul_precision", choices.check_precision),
    ):
        if base[name] is not None:
            check_value(base[name])
