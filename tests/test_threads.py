"""One engine, several threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from tests.engines import Prompt, generate, random_tokens
from tests.schedules import many_rows


def test_one_engine_on_several_threads() -> None:
    """Each with a scheduler of its own; some begin alike, and some are left in the middle."""
    engine = many_rows(1024)
    rng = np.random.default_rng(5)
    common = random_tokens(engine.config, 140, seed=3)
    prompts = [common[:n] + random_tokens(engine.config, 9, seed=n) for n in (0, 130, 140, 135)]
    expected = [generate(many_rows(1024), [Prompt(p, 12)]).tokens[0] for p in prompts]

    def one(number: int) -> bool:
        text = Text(prompts[number % 4], 12)
        scheduler = Scheduler(engine)
        scheduler.add(text)
        found: list[int] = []
        while not scheduler.idle:
            for news in scheduler.turn():
                found += news.tokens
            if number % 5 == 4 and found:
                scheduler.close()
                return found == expected[number % 4][: len(found)]
        return found == expected[number % 4]

    with ThreadPoolExecutor(4) as pool:
        order = rng.permutation(40).tolist()
        assert all(pool.map(one, order))
    assert engine.pool.available == engine.pool.size
