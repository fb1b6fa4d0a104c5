"""Chat with a released Qwen2.5 Instruct model, sampling as its authors recommend.

    python run.py --config=configs/qwen25_instruct.py --prompt='Why is the sky blue?'
    python run.py --config=configs/qwen25_instruct.py --model=my.gguf --prompt_file=questions.jsonl

Downloads Qwen2.5-0.5B-Instruct in Q4_K_M once, then works offline; needs about 3 GB of memory in
float32. Sampling follows the checkpoint's generation_config.json: temperature 0.7, top-p 0.8,
top-k 20, repetition penalty 1.1.
"""

from ml_collections import ConfigDict

from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.model = "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:q4_k_m"
    config.max_tokens = 512
    config.sampling.temperature = 0.7
    config.sampling.top_p = 0.8
    config.sampling.top_k = 20
    config.sampling.repetition_penalty = 1.1
    return config
