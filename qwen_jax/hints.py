"""What somebody meant who wrote a name that there is not."""

import difflib
from collections.abc import Collection

ELSEWHERE = {
    "temp": "temperature",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_return_sequences": "n",
    "num_samples": "n",
    "batch_size": "slots",
    "parallel": "slots",
    "input": "prompt_file",
    "file": "prompt_file",
    "system_prompt": "system",
    "lora": "adapter",
    "logprobs": "top_logprobs",
    "repeat_penalty": "repetition_penalty",
    "ctx_size": "context",
    **dict.fromkeys(("kv_cache_dtype", "cache_type_k", "cache_type_v", "kv_dtype"), "cache_dtype"),
}
"""What other engines call a flag or a field of ours."""


def meant(name: str, known: Collection[str], likeness: float = 0.6) -> str:
    """Which of the known names was meant by another one, else "": what other engines call it, the
    same but for capitals and underscores, its last part, or a word that is as much like it as that,
    from 0 to 1."""
    plain = name.replace("-", "_").lower()
    word = ELSEWHERE.get(plain, plain)
    if word in known:
        return word
    joined = {place.replace("_", "").lower(): place for place in known}
    if written := joined.get(word.replace("_", "")):  # as in topP and Max_Tokens
        return written
    ends = {place.rpartition(".")[2]: place for place in known}
    group, _, last = word.rpartition(".")
    end = ends.get(last, "")
    near = difflib.get_close_matches(name, known, n=1, cutoff=likeness)
    return end if end and end.startswith(group) else next(iter(near), "")
