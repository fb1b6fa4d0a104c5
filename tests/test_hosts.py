"""Several hosts: what --hosts may say, who is still there; and runs of two and four processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import hosts
from qwen_jax.errors import UserError
from qwen_jax.hosts import Place, copies, join, watch
from qwen_jax.hosts.watch import Watch
from qwen_jax.settings import get_config
from tests.cli.conftest import refuses, run

__all__ = ["refuses", "run"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # where a process would have ended
)

REPOSITORY = Path(__file__).parents[1]
SECRET = bytes(range(watch.SECRET))


@given(st.integers(1, 65_535), st.integers(2, 999_999), st.data())
def test_places(port: int, count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, count))
    for address in ("10.0.0.1", "node-1.cluster", "[fe80::1%eth0]"):
        text = f"{address}:{port},{number}/{count}"
        assert hosts.parse(text) == Place(f"{address}:{port}", number, count)
    assert hosts.parse("auto") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2", "must be auto or ADDRESS:PORT,I/N"),
        ("10.0.0.1:9876", "must be auto or ADDRESS:PORT,I/N"),
        ("10.0.0.1,1/2", "must be auto or ADDRESS:PORT,I/N"),
        ("fe80::1:80,1/2", "must be auto or ADDRESS:PORT,I/N"),
        ("a:0,1/2", "a port is a number from 1 to 65535"),
        ("a:80,0/2", "from 1/N to N/N"),
        ("a:80,3/2", "from 1/N to N/N"),
        ("a:80,1/1", "at least two"),
    ],
)
def test_no_places(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        hosts.parse(text)
    assert words in str(error.value) and text in str(error.value)


def test_the_command_line_refuses(refuses: Callable[..., None]) -> None:
    here = "--hosts=127.0.0.1:9876,1/2"
    refuses([here, "--prompt=a"], "hosts needs mesh")
    refuses([here, "--mesh=tp=1", "--prompt=a"], "hosts needs mesh")
    refuses([here, "--mesh=tp=2", "--prompt=-"], "stdin reaches one host alone")
    refuses(
        [here, "--mesh=tp=2", "--prompt=a", "--trace=t.safetensors"], "--trace records what one"
    )
    refuses(
        ["experiment", here, "--config=experiments/haiku_temperature", "--mesh=tp=2", "--dry_run"],
        "--dry_run shows what one host alone can say; leave out --hosts",
    )
    refuses(["--hosts=two", "--mesh=tp=2", "--prompt=a"], "hosts is 'two'")
    nowhere = "--hosts=nowhere.invalid:9876,2/2"
    refuses([nowhere, "--mesh=tp=2", "--prompt=a"], "nowhere.invalid, which nobody here knows")
    with watch.listener() as taken:
        port = taken.getsockname()[1]
        first = f"--hosts=127.0.0.1:{port},1/2"
        refuses([first, "--mesh=tp=2", "--prompt=a"], f"the port {port}, on which", "in use")
    refuses(["inspect", here], "--hosts does nothing for inspect")
    refuses(["serve", here], "--hosts does nothing for serve")


class Three:
    """Connections of three hosts in one process, and whom each has lost."""

    def __init__(self, seconds: float):
        listening = watch.listener()
        port = listening.getsockname()[1]
        stranger = socket.create_connection(("127.0.0.1", port))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n\r\n")
        found: list[dict[int, socket.socket]] = []
        thread = threading.Thread(
            target=lambda: found.append(watch.accepted(listening, 3, SECRET, 10))
        )
        thread.start()
        self.sockets = {
            number: watch.connected("127.0.0.1", port, number, SECRET, 10) for number in (2, 3)
        }
        thread.join()
        stranger.close()
        self.sockets[1] = found[0]
        assert set(self.sockets[1]) == {2, 3}
        self.lost: dict[int, int] = {}
        self.watches: dict[int, Watch] = {}
        self._seconds = seconds

    def watch(self, *numbers: int) -> None:
        for number in numbers:
            given = self.sockets[number], self._loss(number), self._seconds
            self.watches[number] = Watch(*given)

    def die(self, number: int) -> None:
        for connection in self.sockets[number].values():
            connection.close()

    def _loss(self, number: int) -> Callable[[int], NoReturn]:
        def lost(other: int) -> NoReturn:
            self.lost[number] = other
            self.die(number)
            sys.exit()  # of the thread, as the process ends elsewhere

        return lost

    def wait(self, count: int) -> dict[int, int]:
        end = time.monotonic() + 5
        while len(self.lost) < count and time.monotonic() < end:
            time.sleep(0.01)
        return self.lost


def test_who_dies_is_named_by_all() -> None:
    three = Three(30)
    three.watch(1, 2)
    three.die(3)
    assert three.wait(2) == {1: 3, 2: 3}


def test_without_the_first_nobody_goes_on() -> None:
    three = Three(30)
    three.watch(2, 3)
    three.die(1)
    assert three.wait(2) == {2: 1, 3: 1}


def test_who_says_nothing_is_lost() -> None:
    three = Three(0.4)
    three.watch(1, 2)
    assert three.wait(2) == {1: 3, 2: 3}


def test_who_has_done_all_is_not_lost() -> None:
    three = Three(0.4)
    three.watch(1, 2, 3)
    time.sleep(0.8)  # longer than anybody may say nothing
    for each in (3, 1, 2):
        three.watches[each].leave(watch.ENDED)
    three.die(3)
    three.watches[1].wait_for_others(0.1)
    assert three.lost == {}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


VARIABLES = {
    "Slurm": {
        "SLURM_JOB_ID": "{port}",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "{count}",
        "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "{count}",
    },
    "Open MPI": {
        "OMPI_MCA_orte_hnp_uri": "{job}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "{count}",
        "OMPI_COMM_WORLD_RANK": "{rank}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    },
}
"""What launchers tell each process; JAX makes a port of the job's number."""


class Started:
    """A command on so many hosts, which are processes of this one.

    Args:
        own: a flag that one host has, by its number.
        launcher: one of `VARIABLES`, from which they learn who they are.
    """

    def __init__(
        self, count: int, *command: str, own: dict[int, str] | None = None, launcher: str = ""
    ):
        port, own = free_port(), own or {}
        # Two devices of each: of two hosts they make two models as well as one.
        two = "--xla_force_host_platform_device_count=2"
        base = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {two}"}
        self.all = []
        for number in range(1, count + 1):
            where = "auto" if launcher else f"127.0.0.1:{port},{number}/{count}"
            known = {"port": port, "job": port * 2**12, "count": count, "rank": number - 1}
            variables = VARIABLES.get(launcher, {}).items()
            said = {name: value.format(**known) for name, value in variables}
            own_flag = [own[number]] if number in own else []
            started = subprocess.Popen(
                [sys.executable, "run.py", *command, *own_flag, f"--hosts={where}"],
                cwd=REPOSITORY,
                env=base | said,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.all.append(started)

    def ended(self) -> Iterator[tuple[int, str, str]]:
        """Of each host its exit code and what it has said."""
        try:
            for each in self.all:
                out, err = each.communicate(timeout=240)
                yield each.returncode, out, err
        finally:
            for each in self.all:
                each.kill()


def alone(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "run.py", *command], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(path: Path) -> list[tuple[object, ...]]:
    lines = map(json.loads, path.read_text().splitlines())
    return sorted((line["id"], line["text"], tuple(line["tokens"])) for line in lines)


@pytest.mark.hosts
@pytest.mark.parametrize(("count", "mesh"), [(2, "dp=2,tp=2"), (4, "tp=4")])
def test_a_file_on_hosts_is_a_file_on_one(tmp_path: Path, count: int, mesh: str) -> None:
    """The first host writes, and goes on with what another run has begun; others say nothing."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("haiku: snow\nhaiku: moss\n")
    both = (f"--prompt_file={prompts}", "--max_tokens=16", "--temperature=1", "--slots=2")
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    alone(*both, f"--output={one}")
    first, *others = Started(count, f"--mesh={mesh}", *both, f"--output={several}").ended()
    assert first[:2] == (0, "") and f"cpu x 4 ({mesh})" in first[2]
    assert others == [(0, "", "")] * (count - 1)
    assert answers(one) == answers(several)
    prompts.write_text("haiku: snow\nhaiku: moss\nhaiku: rain\n")
    if count == 2:
        again = Started(2, f"--mesh={mesh}", *both, f"--output={several}", "--resume").ended()
        assert [code for code, _, _ in again] == [0, 0]
        alone(*both, f"--output={one}", "--resume")
        assert answers(one) == answers(several) and len(answers(one)) == 3
    assert sorted(tmp_path.iterdir()) == sorted(
        [prompts, *(Path(f"{p}{end}") for p in (one, several) for end in ("", ".settings.json"))]
    )


@pytest.mark.hosts
@pytest.mark.parametrize("dies", [1, 2])
def test_a_host_that_dies_ends_the_others_and_the_experiment_goes_on(
    tmp_path: Path, dies: int
) -> None:
    config = tmp_path / "sweep.py"
    config.write_text(
        "from qwen_jax.experiments.sweep import axis\n"
        "from qwen_jax.settings import get_config as defaults\n\n\n"
        "def get_config():\n"
        "    config = defaults()\n"
        "    config.prompt, config.max_tokens, config.slots = 'haiku: rain', 12, 1\n"
        "    config.sampling.temperature = 1.0\n"
        "    return config\n\n\n"
        "def get_sweep():\n"
        "    return axis('sampling.seed', list(range(20)))\n"
    )
    workdir = tmp_path / "work"
    command = ("experiment", f"--config={config}", "--mesh=tp=2", f"--workdir={workdir}")
    started = Started(2, *command)
    records = workdir / "metrics.jsonl"
    end = time.monotonic() + 200
    while not (records.exists() and "finished" in records.read_text()):
        assert time.monotonic() < end and started.all[0].poll() is None
        time.sleep(0.01)
    started.all[dies - 1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, said = started.all[2 - dies].communicate(timeout=60)
    took = time.monotonic() - killed
    started.all[dies - 1].communicate()
    assert started.all[2 - dies].returncode == 2 and took < 10, said
    assert said.splitlines()[-1] == (
        f"error: host {dies} of 2 has ended or can't be reached any more, so host {3 - dies} ends, "
        "too; start all again, and the experiment goes on."
    )
    assert '"failed"' not in records.read_text()
    assert [code for code, _, _ in Started(2, *command).ended()] == [0, 0]
    other = tmp_path / "alone"
    alone("experiment", f"--config={config}", f"--workdir={other}")
    texts = [
        sorted(json.loads(line)["text"] for line in path.read_text().splitlines())
        for path in (workdir / "outputs.jsonl", other / "outputs.jsonl")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 20


def test_a_host_says_that_it_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Found(Exception):
        """Stands for all that would follow."""

    def initialize(**_: object) -> NoReturn:
        time.sleep(0.5)
        raise Found

    port = free_port()
    monkeypatch.setattr(join, "NOTICE", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(Found):
        join._initialize(Place(f"127.0.0.1:{port}", 2, 2))
    said = capsys.readouterr().err
    assert said == f"waiting for the other hosts, at 127.0.0.1:{port}, for 300 s at most\n"


@pytest.mark.hosts
def test_the_first_host_alone_warns() -> None:
    command = ("--mesh=tp=2", "--prompt=haiku: snow", "--max_tokens=2", "--n=2")
    (code, _, said), other = Started(2, *command).ended()
    assert code == 0 and "WARNING: The temperature is 0" in said
    assert other == (0, "", "")


@pytest.mark.hosts
def test_hosts_that_were_asked_for_something_else() -> None:
    own = {1: "--prompt=haiku: rain", 2: "--prompt=haiku: snow"}
    for code, out, said in Started(2, "--mesh=tp=2", own=own).ended():
        assert (code, out) == (2, "")
        assert (
            "error: The hosts are asked for other things: prompt is 'haiku: rain' on host 1, but "
            "'haiku: snow' on host 2; ask all for the same." in said
        )


def test_what_hosts_differ_in_is_told() -> None:
    config = get_config()
    first = copies.settings(config)
    assert first["sampling.seed"] == repr(config.sampling.seed) and first["prompt"] == "None"
    mesh = first | {"mesh": "'tp=4'"}
    assert copies.difference([mesh, mesh, mesh | {"mesh": "'tp=2'"}]) == (
        "mesh is 'tp=4' on host 1, but 'tp=2' on host 3"
    )
    seeds = [mesh | {"sampling.seed": seed, "dtype": f"'{seed}'"} for seed in "17"]
    assert copies.difference(seeds) in (
        "sampling.seed is 1 on host 1, but 7 on host 2, and dtype, too",
        "dtype is '1' on host 1, but '7' on host 2, and sampling.seed, too",
    )
    one, other = (repr("haiku " * 40 + end + " tree" * 30) for end in ("pine", "oak"))
    said = copies.difference([first | {"prompt": one}, first | {"prompt": other}])
    assert "pine tree" in said and "oak tree" in said and len(said) < 200


@pytest.mark.hosts
def test_a_mesh_that_leaves_hosts_out() -> None:
    for code, out, said in Started(2, "--mesh=dp=2", "--prompt=haiku: rain").ended():
        assert (code, out) == (2, "")
        assert "its tp must be a multiple of the 2 hosts" in said and "--shard=I/N" in said


@pytest.mark.hosts
def test_kubernetes_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    command = [sys.executable, "run.py", "--mesh=tp=2", "--hosts=auto", "--prompt=haiku: rain"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pip install jax[k8s]" in done.stderr and "write ADDRESS:PORT,I/N." in done.stderr


@pytest.mark.hosts
@pytest.mark.parametrize("launcher", VARIABLES)
def test_a_launcher_says_who_they_are(launcher: str) -> None:
    prompt = ("--prompt=haiku: rain", "--max_tokens=12")
    first, second = Started(2, "--mesh=tp=2", *prompt, launcher=launcher).ended()
    assert first[0] == 0 and first[1] == alone(*prompt)
    assert second == (0, "", "")
