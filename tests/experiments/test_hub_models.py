"""Experiments on models of the Hub: which commit ran is recorded, and nothing else goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.experiments.test_resume import Experiment, finished, part
from tests.fake_hub import FakeHub

NAME = f"hf:{FakeHub.repo}"
OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40
SEEDS = 'axis("sampling.seed", range(2))'


@pytest.fixture
def hub(hub_server: FakeHub) -> FakeHub:
    hub_server.names(".gitattributes", "m-q4_k_m.gguf", "m-q8_0.gguf")
    return hub_server


def config_of(workdir: Path) -> dict:
    return json.loads((workdir / "config.json").read_text())


def test_the_commit_is_recorded_and_nothing_is_downloaded(
    experiment: Experiment, run: Callable, hub: FakeHub, tmp_path: Path
) -> None:
    sweep = f'axis("model", ["{NAME}:q8_0", "{NAME}@v1:q8_0", "haiku"])'
    hub.branches |= {"v1": OTHER}
    reference = f'config.experiment.reference.model = "{NAME}@v1:q4_k_m"'
    assert run(*experiment(sweep, reference)).code == 0
    config = config_of(tmp_path / "w")
    assert [point["overrides"]["model"] for point in config["points"]] == [
        *(f"{NAME}@{OLD}:q8_0", f"{NAME}@{OTHER}:q8_0", "haiku")
    ]
    assert config["config"]["experiment.reference.model"] == f"{NAME}@{OTHER}:q4_k_m"
    assert config["changed"]["experiment.reference.model"] == f"{NAME}@{OTHER}:q4_k_m"
    assert set(hub.downloaded) <= {".gitattributes"}


def test_a_branch_that_moved(
    experiment: Experiment, run: Callable, hub: FakeHub, tmp_path: Path
) -> None:
    argv = experiment(SEEDS, f'config.model = "{NAME}:q8_0"')
    assert run(*argv).code == 0 and config_of(tmp_path / "w")["config"]["model"] == (
        f"{NAME}@{OLD}:q8_0"
    )
    before = (tmp_path / "w" / "metrics.jsonl").read_bytes()
    hub.branches["main"] = NEW
    result = run(*argv)
    assert result.code == 2 and "holds an experiment with another config" in result.err
    assert (
        f"{NAME}:q8_0 is asked for at commit {NEW}, and had {OLD}; {NAME}@{OLD}:q8_0 goes on."
        in result.err
    )
    assert f'-  "model": "{NAME}@{OLD}:q8_0"' in result.err
    assert (tmp_path / "w" / "metrics.jsonl").read_bytes() == before
    hub.branches["v1"] = OLD  # Another name for it does, too.
    for revision in (OLD, "v1"):
        result = run(*argv, f"--model={NAME}@{revision}:q8_0")
        assert result.code == 0 and "2 of 2 points have been run" in result.err
    assert run(*argv[:2], f"--workdir={tmp_path / 'new'}").code == 0


def test_a_swept_model_that_moved(
    experiment: Experiment, run: Callable, hub: FakeHub, tmp_path: Path
) -> None:
    sweep = 'axis("model", ["{0}:q8_0", "haiku"])'
    assert run(*experiment(sweep.format(NAME))).code == 0
    hub.branches["main"] = NEW
    result = run(*experiment(sweep.format(NAME)))
    assert result.code == 2 and f"{NAME}@{OLD}:q8_0 goes on." in result.err
    assert run(*experiment(sweep.format(f"{NAME}@{OLD}"))).code == 0


def test_without_network_the_same_commit_goes_on(
    experiment: Experiment, run: Callable, hub: FakeHub, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    argv = experiment(SEEDS, f'config.model = "{NAME}:q8_0"')
    run(*argv)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run(*argv)
    assert result.code == 0 and "2 of 2 points have been run" in result.err
    result = run(*argv[:2], "--model=hf:other/repo", f"--workdir={tmp_path / 'v'}")
    assert result.code == 2 and "HF_HUB_OFFLINE forbids asking the Hub" in result.err
    assert not (tmp_path / "v").exists()


def test_shards_of_different_commits_are_not_merged(
    experiment: Experiment, run: Callable, hub: FakeHub, tmp_path: Path
) -> None:
    argv, w = experiment(SEEDS, f'config.model = "{NAME}:q8_0"'), tmp_path / "w"
    first = part(run, argv, w, "1/2")
    hub.branches["main"] = NEW
    second = part(run, argv, w, "2/2")
    assert len(finished(first)) == len(finished(second)) == 1
    result = run("merge", str(w))
    assert result.code == 2 and "are of different experiments" in result.err
    assert (
        f"{NAME}:q8_0 is at commit {OLD} in one and {NEW} in the other; run the other's points "
        f"with {NAME}@{OLD}:q8_0." in result.err
    )


def test_two_names_of_one_commit_are_one_point(
    experiment: Experiment, refuses: Callable, hub: FakeHub
) -> None:
    hub.branches["v1"] = OLD
    refuses(
        experiment(f'axis("model", ["{NAME}:q8_0", "{NAME}@v1:q8_0"])'),
        "GGUF@aaaaaaa:q8_0 twice; keep one.",
    )


def test_what_no_point_reads_is_not_asked_for(
    experiment: Experiment, run: Callable, hub: FakeHub, tmp_path: Path
) -> None:
    argv = experiment('axis("model", ["haiku"])', 'config.model = "hf:not/there"')
    assert run(*argv).code == 0
    assert config_of(tmp_path / "w")["config"]["model"] == "hf:not/there"
