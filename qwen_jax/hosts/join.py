"""A process becomes one of a run's hosts, and ends as one."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import IO, Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from qwen_jax import hosts, settings
from qwen_jax.errors import UserError
from qwen_jax.hosts import ENVIRONMENTS, LOST, NEEDS_MESH, NOTICE, WAIT, Place, copies, parse, watch
from qwen_jax.hosts.watch import Watch
from qwen_jax.mesh import MeshShape
from qwen_jax.settings import Command


@dataclasses.dataclass(frozen=True)
class Joined:
    """What this process is in a run of several hosts.

    Attributes:
        number: from 1; the first one writes.
        errors: where it tells of faults; what else goes to stderr only the first one says.
        folder: of the copies that it works on, which are nobody's then; the first has none.
    """

    number: int
    count: int
    watch: Watch
    errors: IO[str]
    folder: Path | None

    def wait_for_loss(self) -> None:
        """What has failed may have because another host is gone: its watch then ends this one, if
        it is only given the time."""
        self.watch.wait_for_others(2 * watch.GRACE)

    def end(self, code: int) -> None:
        """Before the process ends; all hosts end alike, but where one tells of a fault."""
        if code in (0, 1, 3):
            self.watch.leave(watch.ENDED)
            return
        self.watch.leave(watch.TOLD)
        if self.number == 1:  # whose end would have JAX abort others that tell of the same
            self.watch.wait_for_others(2 * watch.GRACE)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            self.errors.flush()
        _remove(self.folder)
        os._exit(code)


def join(command: Command) -> Command:
    """Waits for the other hosts, and returns the command as this one is to run it.

    Raises:
        UserError: the environment says of no others, they can't be reached, or were asked for
            something else.
    """
    config = command.config
    place = parse(config.hosts)
    config.hosts = None  # what is done on several hosts is what one does
    overrides = {name: value for name, value in command.overrides.items() if name != "hosts"}
    command = dataclasses.replace(command, overrides=overrides)
    _check(command)
    address = _initialize(place)
    number, count = jax.process_index() + 1, jax.process_count()
    if count == 1:
        raise UserError(
            "hosts is auto, but the environment says of one host alone; start several, or leave "
            "hosts out."
        )
    errors, folder = sys.stderr, None
    _keep_stdout_apart(number)
    asked = count if place is None else place.of
    _compare_settings(copies.settings(config) | {"N of hosts": str(asked)})
    _compare_files(copies.seen(config))
    if number > 1:
        command, folder = copies.on_copies(command)
        sys.stderr = sys.stdout
        logging.get_absl_handler().python_handler.setStream(sys.stdout)

    def lost(other: int) -> NoReturn:
        _remove(folder)
        watch.end_with(_sentence(other, number, count, command.task), 2)

    connections = _connections(address, number, count)
    hosts.joined = Joined(number, count, Watch(connections, lost, LOST), errors, folder)
    # From here on the first one may write what others have copied.
    multihost_utils.sync_global_devices("joined")
    return command


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _check(command: Command) -> None:
    """Raises UserError for what hosts can't do together."""
    config, task = command.config, command.task
    asked = settings.asked(config, command.overrides)
    if task == "generate" and MeshShape.parse(config.mesh).devices == 1:
        raise UserError(NEEDS_MESH)
    if "-" in (config.prompt, config.prompt_file) or (
        task == "generate" and config.prompt is None and config.prompt_file is None
    ):
        raise UserError(
            "stdin reaches one host alone; with hosts give --prompt_file=FILE, which all can read, "
            "or --prompt=TEXT."
        )
    if config.runner.dry_run:
        raise UserError(
            "--dry_run shows what one host alone can say; leave out --hosts, and --mesh where it "
            "takes more devices than this one has."
        )
    if "trace.file" in asked:
        raise UserError("--trace records what one host can see; leave out --hosts or --trace.")
    if config.runner.max_time is not None:
        raise UserError(
            "--max_time would be over on one host before another; leave it or --hosts out."
        )


def _initialize(place: Place | None) -> str:
    """Wakes JAX as one of several; returns the first host's address."""
    given: dict[str, Any] = {}
    if place is not None:
        _check_address(place)
        given = {
            "coordinator_address": place.address,
            "num_processes": place.of,
            "process_id": place.number - 1,
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX itself would abort, in its own words.
    waiting = threading.Timer(WAIT, watch.end_with, (_waited(place), 2))
    waiting.daemon = True
    waiting.start()
    notice = threading.Timer(NOTICE, print, (_waiting(place),), {"file": sys.stderr})
    notice.daemon = True
    notice.start()
    try:
        with warnings.catch_warnings(record=True) as warned:
            jax.distributed.initialize(**given, initialization_timeout=2 * WAIT)
    except (ValueError, RuntimeError) as error:  # JAX's own are RuntimeErrors
        why = " ".join(str(error).split()).rstrip(".")
        if place is None:
            # As that Kubernetes is there, but not its package.
            why = " ".join(" ".join([str(w.message) for w in warned] or [why]).split())
            raise UserError(
                f"hosts is auto, but JAX finds no {ENVIRONMENTS} here to say who they are ({why}); "
                "write ADDRESS:PORT,I/N."
            ) from error
        raise UserError(
            f"hosts is {place.address},{place.number}/{place.of}, but they don't find each "
            f"other ({why}); start all of them, with the address of the first."
        ) from error
    finally:
        notice.cancel()
        waiting.cancel()
    from jax._src.distributed import global_state  # what an environment said is told nowhere else

    assert global_state.coordinator_address is not None
    return global_state.coordinator_address


def _waiting(place: Place | None) -> str:
    return f"waiting for the other hosts, {_where(place)}, for {WAIT} s at most"


def _waited(place: Place | None) -> str:
    return f"the other hosts were not there after {WAIT} s, {_where(place)}; start all of them."


def _where(place: Place | None) -> str:
    return "as the environment says" if place is None else f"at {place.address}"


def _check_address(place: Place) -> None:
    """What JAX would wait for, or abort of: an address that nobody knows, a port that is taken."""
    host, _, port = place.address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(
            f"hosts has the address {host:.80}, which nobody here knows ({error}); give the first "
            "host's name or number."
        ) from error
    if place.number == 1:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"hosts has the port {port}, on which the first host can't listen "
                f"({os.strerror(error.errno or 0)}); choose another, and let one host alone be the "
                "first."
            ) from error


def _keep_stdout_apart(number: int) -> None:
    """Answers go to stdout, of the first host alone; what libraries print there, as Gloo does of
    whom it has found, to stderr."""
    sys.stdout.flush()
    first = number == 1
    own = os.dup(1) if first else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2 if first else own, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8", errors="backslashreplace")


def _connections(address: str, number: int, count: int) -> dict[int, socket.socket]:
    """Of the hosts' watches, to each other."""
    listening = watch.listener() if number == 1 else None
    port = listening.getsockname()[1] if listening else 0
    said = np.frombuffer(port.to_bytes(4, "big") + os.urandom(watch.SECRET), np.uint8)
    heard = multihost_utils.broadcast_one_to_all(said).tobytes()
    port, secret = int.from_bytes(heard[:4], "big"), heard[4:]
    host = address.rpartition(":")[0].strip("[]")
    try:
        if listening is not None:
            return watch.accepted(listening, count, secret, LOST)
        return watch.connected(host, port, number, secret, LOST)
    except OSError as error:
        # At once: JAX would wait for the others before it lets this one go.
        watch.end_with(
            f"the hosts can't reach each other at port {port} of {host} ({error}), where the first "
            "listens for whether they are still there; let them.",
            2,
        )


def _compare_settings(mine: dict[str, str]) -> None:
    """Raises UserError where hosts were asked for something else."""
    every = [json.loads(said) for said in _exchanged(json.dumps(mine).encode())]
    if any(one != mine for one in every):
        raise UserError(
            f"The hosts are asked for other things: {copies.difference(every)}; ask all for the "
            "same."
        )


def _exchanged(mine: bytes) -> list[bytes]:
    """What every host says, this one too, in their order."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.frombuffer(mine.ljust(int(sizes.max()), b" "), np.uint8)
    return [
        row[:size].tobytes()
        for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    ]


def _compare_files(mine: dict[str, bytes]) -> None:
    """Raises UserError where hosts that are asked for the same find other files."""
    every = _exchanged(b"".join(mine.values()))
    for i, name in enumerate(mine):
        if len({said[32 * i : 32 * (i + 1)] for said in every}) > 1:
            raise UserError(
                f"The hosts don't find the same in {name}; let it lie on a file system that they "
                "share."
            )


def _sentence(other: int, number: int, count: int, task: str) -> str:
    again = {
        "experiment": "start all again, and the experiment goes on",
        "generate": "start all again; what is in --output is gone on with by --resume",
    }[task]
    return (
        f"host {other} of {count} has ended or can't be reached any more, so host {number} ends, "
        f"too; {again}."
    )
