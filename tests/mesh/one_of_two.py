"""One of two processes that have the bundled model together: `one_of_two.py PORT NUMBER`.

Prints what it has and what it says as a line of JSON.
"""

import json
import sys
from unittest import mock

import jax

import qwen_jax
from qwen_jax.engine import memory


def main() -> None:
    port, number = map(int, sys.argv[1:])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    # The other has less memory, and both must have as many pages.
    with mock.patch.object(memory, "free_memory", lambda: (64 - 42 * number) << 20):
        model = qwen_jax.load(mesh="tp=2", slots=2)
    made = model.generate(["haiku: snow", "haiku: moss"], sampling=qwen_jax.Sampling(temperature=1))
    sizes = [shard.data.shape for shard in model.engine.pages.addressable_shards]
    print(
        json.dumps(
            {
                "texts": [completion.text for completion in made],
                "pages": model.engine.layout.pages,
                "shards": sizes,
            }
        )
    )


if __name__ == "__main__":
    main()
