"""A report of 1,000 points and 100,000 answers: how long it takes to make, how large it is, and how
long a browser takes to open it.

The records are made up: haiku of the bundled model's words, half of them right. A page is open when
its scripts have run and all is laid out, by the browser's own clock.

    python -m benchmarks.large_report [--points 1000] [--prompts 100]
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwen_jax.experiments.contents import METRICS, OUTPUTS, SCORES

CONFIG = '''"""A large experiment."""
from qwen_jax.experiments import axis, product
from qwen_jax.settings import get_config as defaults
def get_config():
    config = defaults()
    config.prompt_file, config.experiment.template = {prompts!r}, "haiku: {{word}}"
    config.experiment.scores = ("haiku",)
    return config
def get_sweep():
    return product(
        axis("sampling.temperature", [i / 100 for i in range({settings})]),
        axis("sampling.seed", range({seeds})),
    )
'''
LINES = ("the coldest morning", "silver fills the empty bowl", "spring is a rumour", "no one there")
SEEDS = 5
OPENED = """
void document.body.offsetHeight;  // lays out
document.documentElement.dataset.opened = performance.now();
"""


def run(*arguments: str) -> None:
    """run.py, as a process of its own."""
    program = Path(__file__).parents[1] / "run.py"
    subprocess.run([sys.executable, str(program), *arguments], check=True, capture_output=True)


def make(folder: Path, points: int, prompts: int) -> Path:
    """A workdir whose records say that all points have run."""
    words = folder / "words.jsonl"
    held = (json.dumps({"id": f"w{i}", "word": f"word{i}"}) + "\n" for i in range(prompts))
    words.write_text("".join(held))
    config, workdir = folder / "config.py", folder / "run"
    fields = {"prompts": str(words), "settings": points // SEEDS, "seeds": SEEDS}
    config.write_text(CONFIG.format(**fields))
    # A shard beyond the last point has none to run, and all of them in its description.
    run("experiment", f"--config={config}", f"--workdir={workdir}", f"--shard=1/{points + 1}")
    shard = workdir / f"shard-1-of-{points + 1}"
    description = json.loads((shard / "config.json").read_text())
    ids = [point["id"] for point in description["points"]]
    description |= {"assigned": ids, "shard": None}
    (shard / "config.json").write_text(json.dumps(description))
    _record(shard, ids, prompts)
    return shard


def _record(shard: Path, ids: list[str], prompts: int) -> None:
    rng = random.Random(0)
    with (
        (shard / METRICS).open("a") as metrics,
        (shard / OUTPUTS).open("w") as outputs,
        (shard / SCORES).open("w") as scores,
    ):
        for point in ids:
            right = [float(rng.random() < 0.5) for _ in range(prompts)]
            for row, value in enumerate(right):
                text = "\n".join([f"word{row}", *rng.sample(LINES, 3)])
                answer = {"point": point, "row": row, "id": f"w{row}", "sample": 0, "text": text}
                tokens = [rng.randrange(2048) for _ in range(22)]
                answer |= {"finish_reason": "stop", "prompt_tokens": 9, "tokens": tokens}
                outputs.write(json.dumps(answer) + "\n")
                line = {"point": point, "of": "prompt", "unit": row, "id": f"w{row}"}
                scores.write(json.dumps(line | {"scores": {"haiku": value}}) + "\n")
            found = {"haiku": sum(right) / prompts, "tokens_per_s": rng.uniform(300, 400)}
            end = {"event": "finished", "point": point, "metrics": found, "outputs": prompts}
            metrics.write(json.dumps({"event": "started", "point": point}) + "\n")
            metrics.write(json.dumps(end) + "\n")


def opened(page: Path) -> float | None:
    """Seconds from the beginning of navigation until a browser has laid the page out."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return None
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text().replace("</body>", f"<script>{OPENED}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu"]
    dom = subprocess.run(
        [browser, *options, "--dump-dom", f"file://{acted}"], capture_output=True, check=True
    ).stdout.decode()
    acted.unlink()
    found = re.search(r'data-opened="([\d.]+)"', dom)
    return float(found[1]) / 1000 if found else None


def main(points: int, prompts: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        workdir = make(Path(name), points, prompts)
        start = time.perf_counter()
        run("report", str(workdir))
        seconds = time.perf_counter() - start
        pages = [workdir / "report.html", *workdir.glob("report-*.html")]
        record = {
            "benchmark": "large_report",
            "points": points,
            "answers": points * prompts,
            "seconds": round(seconds, 1),
            "pages": len(pages),
            "first_page_mb": round(pages[0].stat().st_size / 1e6, 1),
            "largest_page_mb": round(max(page.stat().st_size for page in pages) / 1e6, 1),
            "opened_seconds": opened(pages[0]),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
    print("| report | |\n| --- | --- |")
    for what, value in record.items():
        print(f"| {what} | {value} |")
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=100)
    main(**vars(parser.parse_args()))
