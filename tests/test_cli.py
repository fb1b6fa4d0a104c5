"""run.py: what is wrong is said in one sentence with exit code 2; streams, Ctrl-C, output files."""

import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen_jax import api, cli, interrupts, measure, settings
from qwen_jax.errors import UserError
from qwen_jax.tasks import prompts
from qwen_jax.weights import loader
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf

REPOSITORY = Path(__file__).parents[1]
BUNDLED = api.locate()
HAIKU = "a thin rising moon\nlantern passes like a cloud\nnothing is missing"


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run.py in this process."""

    def run(*argv: str) -> Result:
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def refuses(run: Run) -> Callable[..., None]:
    """Asserts that run.py answers with one sentence in which some words stand, and nothing else."""

    def refuses(argv: list[str], *words: str) -> None:
        result = run(*argv)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        for word in words:
            assert word in result.err

    return refuses


@pytest.fixture(scope="module")
def model() -> api.Model:
    return api.load()


@pytest.fixture
def loaded(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> api.Model:
    """run.py finds the bundled model loaded, and compiled by earlier tests."""
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: model)
    return model


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(api, "load", load)


class TestFlags:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            ("--promt=x", "no flag --promt; did you mean --prompt?"),
            ("--sampling.temperature=1", "did you mean --config.sampling.temperature?"),
            ("--foobar", "no flag --foobar; see run.py --help"),
            ("--helpxml", "no flag --helpxml"),
            ("--prompt", "Missing value for flag --prompt"),
            ("generat", "'generat' is not a task; did you mean 'generate'?"),
            ("stray", "'stray' is not a task; the tasks are generate, inspect."),
            ("-- foo", "'foo' is not a task"),
            ("generate stray", "'stray' belongs to no flag"),
            ("inspect model.gguf", "'model.gguf' belongs to no flag"),
            ("--n=abc", "--n is 'abc', but it must be a whole number"),
            ("--max_tokens=1.5", "--max_tokens is '1.5', but it must be a whole number"),
            ("--temperature=hot", "--temperature is 'hot', but it must be a number"),
            ("--raw=maybe", "--raw is 'maybe', but it must be true or false"),
            ("--flagfile=nowhere", "Unable to open flagfile"),
            (
                "--config.sampling.temprature=1",
                "no flag --config.sampling.temprature; did you mean --config.sampling.temperature?",
            ),
            ("--config.max_tokens=abc", "--config.max_tokens is 'abc', but it must be a whole"),
            ("--config.sampling=3", "no flag --config.sampling;"),
            ("--config.=3", "no flag --config."),
        ],
    )
    def test_refused(self, refuses: Callable[..., None], argv: str, words: str) -> None:
        refuses(argv.split(" "), words)

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            ("--n=0", "n is 0"),
            ("--n=-1", "n is -1"),
            ("--max_tokens=0", "max_tokens is 0"),
            ("--batch_size=-5", "batch_size is -5"),
            ("--temperature=nan", "sampling.temperature is nan"),
            ("--temperature=-0.1", "sampling.temperature is -0.1"),
            ("--temperature=inf", "sampling.temperature is inf"),
            ("--top_p=0", "sampling.top_p is 0"),
            ("--top_p=1.1", "sampling.top_p is 1.1"),
            ("--top_k=-1", "sampling.top_k is -1"),
            ("--min_p=2", "sampling.min_p is 2"),
            ("--seed=-1", "sampling.seed is -1"),
            ("--seed=4294967296", "sampling.seed is 4294967296"),
            ("--config.sampling.repetition_penalty=0", "repetition_penalty is 0"),
            ("--config.sampling.presence_penalty=nan", "presence_penalty is nan"),
            ("--config.sampling.logit_bias=foo", "holds 'foo', but it must be like 42:-1.5,7:3"),
            ("--config.sampling.logit_bias=1:nan", "logit_bias"),
            ("--config.sampling.logit_bias=1:2:3", "holds '1:2:3'"),
            ("--config.sampling.logit_bias=1:2,1:3", "names token 1 twice"),
            ("--stop=", "stop is ('',)"),
            ("--prompt=", "the prompt is empty"),
            ("--model=x.gguf", "There is no prompt"),
            ("--output=x.jsonl", "--output needs --prompt_file"),
            ("--prompt=x --prompt_file=y", "exclude each other"),
            ("--prompt_file=nowhere.txt", "nowhere.txt can't be read: No such file"),
            ("--prompt_file=", "can't be read"),
            (f"--prompt_file={'x' * 5000}", "can't be read: File name too long"),
        ],
    )
    @pytest.mark.usefixtures("nothing_loads")
    def test_values_that_make_no_sense(
        self, refuses: Callable[..., None], argv: str, words: str
    ) -> None:
        refuses(argv.split(" "), words)

    @pytest.mark.parametrize("task", ["generate", "inspect"])
    @pytest.mark.parametrize(
        ("flag", "words"),
        [
            ("--dtype=int8", "dtype is 'int8', but it must be one of auto, float32"),
            ("--implementation=cuda", "implementation is 'cuda', but it must be one of auto"),
            ("--implementation=mosaic_gpu", "use implementation 'auto' or 'xla'"),
        ],
    )
    def test_unknown_names(
        self, refuses: Callable[..., None], task: str, flag: str, words: str
    ) -> None:
        refuses([task, flag], words)

    def test_matmul_precision(self, refuses: Callable[..., None]) -> None:
        refuses(["--config.matmul_precision=low"], "matmul_precision is 'low'")

    def test_a_flag_wins_over_the_config_wherever_it_stands(self) -> None:
        file = REPOSITORY / "configs" / "haiku.py"
        task, config = cli.parse(
            f"run.py --max_tokens=7 --config.max_tokens=8 --config.n=2 inspect --stop=a --stop b "
            f"--config={file} --noraw --top_p=1".split()
        )
        assert task == "inspect"
        assert (config.max_tokens, config.n, config.stop) == (7, 2, ("a", "b"))
        assert config.sampling.to_dict() == settings.get_config().sampling.to_dict() | {
            "temperature": 0.8,
            "min_p": 0.05,
        }

    def test_every_flag_stands_for_a_field_of_its_type(self) -> None:
        samples = {str: "x", int: 3, float: 0.5, bool: True, tuple: ("x",)}
        for flag, (field, _) in settings.FLAGS.items():
            value = samples[settings.type_of(field)]
            given = value[0] if isinstance(value, tuple) else value
            _, config = cli.parse(["run.py", f"--{flag}={given}"])
            assert dict(settings.flatten(config))[field] == value

    @given(
        st.lists(st.sampled_from(["-", "--", "config", ".", "=", "n", "1", "max_tokens", "\0é"]))
    )
    def test_any_arguments(self, parts: list[str]) -> None:
        argument = "".join(parts)
        try:
            task, config = cli.parse(["run.py", argument])
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert task in cli.TASKS and len(config) == len(settings.get_config())

    def test_help_lists_flags_and_fields_and_needs_no_jax(self) -> None:
        program = (
            "import sys; from qwen_jax.cli import main; code = main(['inspect', '--help'])\n"
            "sys.exit(code or 10 * bool({'jax', 'numpy', 'tokenizers'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        for name in settings.FLAGS:
            assert f"  --{name} " in done.stdout
        for name, value in settings.flatten(settings.get_config()):
            assert f"  {name}={value!r}" in done.stdout


CONFIGS = {
    "def get_config(:\n  pass\n": "config.py, line 1: SyntaxError: invalid syntax",
    "x = 1\n\n  y = 2\n": "config.py, line 3: IndentationError",
    "x = 1\n": "config.py defines no get_config()",
    "get_config = 3\n": "config.py defines no get_config()",
    "import nowhere\n": "line 1: ModuleNotFoundError: No module named 'nowhere'",
    "def get_config():\n  raise ValueError('one\\ntwo')\n": "line 2: ValueError: one two",
    "def get_config():\n  return {}['key']\n": "line 2: KeyError: 'key'",
    "import json\ndef get_config():\n  return json.loads('{')\n": "config.py, line 3: JSONDecode",
    "def get_config():\n  return get_config()\n": "line 2: RecursionError",
    "import sys\nsys.exit(3)\n": "line 2: SystemExit: 3",
    "open('nowhere')\n": "line 1: FileNotFoundError",
    "def get_config():\n  pass\n": "must return a ConfigDict, but returned NoneType",
    "def get_config():\n  return {}\n": "must return a ConfigDict, but returned dict",
    "def get_config(a, b): pass\n": "TypeError: get_config() missing 2 required",
}
FIELDS = {
    "{'promt': 'x'}": "sets promt, which is no field; did you mean prompt?",
    "{'sampling': {'temprature': 1}}": "did you mean sampling.temperature?",
    "{'sampling': 3}": "sets sampling, which is no field",
    "{'max_tokens': 'abc'}": "max_tokens is 'abc', but it must be a whole number",
    "{'n': True}": "n is True, but it must be a whole number",
    "{'model': None}": "model is None, but it must be text",
    "{'stop': 'abc'}": "stop is 'abc', but it must be a tuple of texts",
    "{'sampling': {'temperature': '1'}}": "sampling.temperature is '1', but it must be a number",
}


class TestConfigFiles:
    @pytest.mark.parametrize("program", CONFIGS)
    def test_that_fail(self, refuses: Callable[..., None], tmp_path: Path, program: str) -> None:
        path = tmp_path / "config.py"
        path.write_text(program)
        refuses([f"--config={path}"], CONFIGS[program])

    @pytest.mark.parametrize("content", [b"x = '\xff'\n", b"x = 1\0\n", b"\x7fELF\x02"])
    def test_that_are_no_text(
        self, refuses: Callable[..., None], tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "config.py"
        path.write_bytes(content)
        refuses([f"--config={path}"], "config.py", "SyntaxError")

    @pytest.mark.parametrize("fields", FIELDS)
    def test_fields(self, refuses: Callable[..., None], tmp_path: Path, fields: str) -> None:
        path = tmp_path / "config.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n  return ConfigDict({fields})"
        )
        refuses([f"--config={path}"], FIELDS[fields])

    def test_that_are_not_there(self, refuses: Callable[..., None], tmp_path: Path) -> None:
        refuses(["--config=nowhere.py"], "--config=nowhere.py can't be read: No such file")
        refuses([f"--config={tmp_path}"], "can't be read: Is a directory")
        refuses(["--config="], "can't be read")
        refuses([f"--config={'x' * 5000}"], "can't be read: File name too long")

    def test_fields_left_out_keep_their_defaults(self, tmp_path: Path) -> None:
        path = tmp_path / "config.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            "def get_config(variant=''):\n"
            "  return ConfigDict({'prompt': variant, 'sampling': {'temperature': 1}})"
        )
        _, config = cli.parse(["run.py", f"--config={path}:a:b"])
        expected = dict(settings.flatten(settings.get_config()))
        expected |= {"prompt": "a:b", "sampling.temperature": 1.0}
        assert dict(settings.flatten(config)) == expected

    @pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.py")), ids=str)
    def test_shipped(self, refuses: Callable[..., None], path: Path) -> None:
        settings.load(str(path))
        if path.name == "haiku.py":
            assert settings.load(f"{path}:greedy").sampling.temperature == 0
            refuses([f"--config={path}:hot"], "no variant 'hot', only 'greedy'")


def damaged() -> dict[str, tuple[bytes, str]]:
    whole = BUNDLED.read_bytes()
    return {
        "empty": (b"", "the file is empty"),
        "magic": (b"GGUF", "beyond the end"),
        "text": (b"hello " * 1000, "it is no GGUF file"),
        "header": (whole[:5000], "beyond the end"),
        "half": (whole[: len(whole) // 2], "the download is incomplete"),
        "tail": (whole[:-1], "the download is incomplete"),
        "values": (whole[:-100000] + b"\xff" * 100000, "values that are not finite"),
    }


class TestModels:
    @pytest.mark.parametrize("kind", damaged())
    def test_damaged(self, refuses: Callable[..., None], tmp_path: Path, kind: str) -> None:
        content, words = damaged()[kind]
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        refuses([f"--model={path}", "--prompt=x"], str(path), words)
        if kind != "values":  # which inspect doesn't read
            refuses(["inspect", f"--model={path}"], str(path), words)

    def test_huge(self, refuses: Callable[..., None], tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        with path.open("wb") as file:
            file.truncate(1 << 40)
        refuses([f"--model={path}", "--prompt=x"], "it is no GGUF file")

    def test_without_a_tokenizer(self, refuses: Callable[..., None], tmp_path: Path) -> None:
        config = tiny_config()
        path = write_gguf(tmp_path / "model.gguf", config, random_parameters(config)).path
        for task in cli.TASKS:
            refuses([task, f"--model={path}", "--prompt=x"], "tokenizer.ggml", "missing")
        path = write_hf(tmp_path / "model", config, random_parameters(config)).path
        refuses([f"--model={path}", "--prompt=x"], "tokenizer.json is missing")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("nowhere.gguf", "there is no such file"),
            ("", "there is no such file"),
            ("~nobody/x.gguf", "there is no such file"),
            ("x" * 5000, "there is no such file"),
            ("http://host/x.gguf", "there is no such file"),
            ("hf:", "does not read hf:owner/repo"),
            ("hf:a/b:c:d", "does not read hf:owner/repo"),
            ("/dev/null", "cannot be read"),
        ],
    )
    def test_that_are_not_there(self, refuses: Callable[..., None], name: str, words: str) -> None:
        refuses([f"--model={name}", "--prompt=x"], words)

    def test_directories(self, refuses: Callable[..., None], tmp_path: Path) -> None:
        refuses([f"--model={tmp_path}", "--prompt=x"], "holds no model")
        for name in "ab":
            (tmp_path / f"{name}.gguf").write_bytes(b"")
        refuses([f"--model={tmp_path}", "--prompt=x"], "holds the GGUF files a.gguf, b.gguf")
        (tmp_path / "config.json").write_text("{")
        refuses([f"--model={tmp_path}", "--prompt=x"], "config.json: the JSON is not valid")

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ("0" * 64, "the SHA-256 is"),
            ("abc", "'abc' is not 64 hexadecimal digits"),
            ("", "'' is not 64 hexadecimal digits"),  # as an unset variable leaves it
            (f"{'0' * 64},{'0' * 64}", "2 hash(es) were given"),
        ],
    )
    def test_sha256(self, refuses: Callable[..., None], given: str, words: str) -> None:
        refuses([f"--sha256={given}"], words)

    def test_sha256_of_other_things(self, refuses: Callable[..., None], tmp_path: Path) -> None:
        part = tmp_path / "m-00001-of-00002.gguf"
        part.write_bytes(BUNDLED.read_bytes())
        flag = f"--sha256={'0' * 64}"
        refuses([f"--model={part}", "--prompt=x", flag], "the model is 2")
        config = tiny_config()
        path = write_hf(tmp_path / "hf", config, random_parameters(config)).path
        refuses([f"--model={path}", "--prompt=x", flag], "sha256 is for GGUF files")

    def test_weights_that_do_not_fit(
        self, refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(measure, "free_memory", lambda: 10_000_000)
        monkeypatch.setattr(loader, "decode_into", lambda *args: pytest.fail("it was loaded"))
        refuses(["--dtype=float32"], "weights take 13.3 MB in float32", "10.0 MB free", "bfloat16")

    @pytest.mark.usefixtures("loaded")
    def test_a_cache_that_does_not_fit(
        self, refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuses(["--n=100000"], "100000 texts of up to", "lower n")
        # Read where it is known, as of an accelerator.
        monkeypatch.setattr(measure, "free_memory", lambda: 1000)
        refuses([], "1 texts of up to", "1.0 kB free")

    @pytest.mark.parametrize("platform", ["nonsense", "cuda"])
    def test_no_device(self, platform: str) -> None:
        environment = os.environ | {"JAX_PLATFORMS": platform}
        command = [sys.executable, str(REPOSITORY / "run.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            pytest.skip(f"JAX has the platform {platform} here, so it can't be missing")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert f"cannot use the platform in JAX_PLATFORMS={platform}" in done.stderr

    @pytest.mark.usefixtures("loaded")
    def test_out_of_memory_on_the_device(
        self, refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch, loaded: api.Model
    ) -> None:
        def exhausted(*args: object) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating")

        monkeypatch.setattr(loaded.engine, "prefill", exhausted)
        refuses([], "ran out of memory (RESOURCE_EXHAUSTED: Out of memory); lower n")


@pytest.mark.usefixtures("loaded")
class TestPrompts:
    def test_the_default_is_a_haiku(self, run: Run) -> None:
        result = run()
        assert (result.code, result.out) == (0, HAIKU + "\n")
        for word in ("prompt ", "generation ", "first token ", "compilation ", "memory "):
            assert word in result.err
        assert "finished    stop\nsampling    greedy\n" in result.err

    def test_too_long_or_out_of_range(self, refuses: Callable[..., None]) -> None:
        refuses(["--prompt=" + "word " * 3000], "The prompt has 3029 tokens", "context of 512")
        refuses(["--prompt=x", "--system=y", "--raw"], "A raw prompt is one text")
        refuses(["--prompt=a\udcffb"], "not valid Unicode")
        for top in ("2049", "-1"):
            refuses([f"--top_logprobs={top}"], f"top_logprobs is {top}", "2048 tokens")
        for token in ("-1", "2048"):
            refuses([f"--config.sampling.logit_bias={token}:1"], f"token {token}")

    @pytest.mark.parametrize("most", ["1000000000", "99999999999999999999"])
    def test_the_context_ends_what_max_tokens_does_not(
        self, run: Run, loaded: api.Model, most: str
    ) -> None:
        bans = ",".join(f"{i}:-inf" for i in loaded.tokenizer.stop_ids)
        flags = [f"--max_tokens={most}", f"--config.sampling.logit_bias={bans}"]
        result = run("--prompt=Write a haiku about rivers.", *flags)
        assert result.code == 0
        assert "finished    length" in result.err
        assert "prompt      35 tokens" in result.err
        assert f"generation  {512 - 35 - 1} tokens" in result.err

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (b"", "stdin: the prompt is empty"),
            (b"\n", "stdin: the prompt is empty"),
            (b"a\xffb", "stdin is not UTF-8 at byte 1"),
        ],
    )
    def test_bad_stdin(
        self,
        refuses: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        given: bytes,
        words: str,
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        refuses(["--prompt=-"], words)

    def test_stdin(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        given = f"{prompts.HAIKU}\n".encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert run("--prompt=-").out == HAIKU + "\n"

    def test_stop_strings(self, run: Run) -> None:
        result = run("--stop=nowhere", "--stop=like a")
        assert result.out == HAIKU[: HAIKU.index("like a")] + "\n"
        assert "finished    stop" in result.err

    def test_several_samples(self, run: Run) -> None:
        result = run("--n=3", "--temperature=1")
        parts = result.out.split("--- sample ")
        assert [part[:2] for part in parts] == ["", "1\n", "2\n", "3\n"]
        assert len({part[2:] for part in parts}) == 4
        assert "sampling    temperature 1.0, seed 0" in result.err
        assert run("--n=3", "--temperature=1").out == result.out

    def test_logprobs(self, run: Run, loaded: api.Model) -> None:
        result = run("--top_logprobs=2", "--max_tokens=3")
        tokens = loaded.tokens(prompts.HAIKU)
        chosen = loaded.generate(prompts.HAIKU, max_tokens=3, top_logprobs=2)
        assert isinstance(chosen, api.Completion)
        lines = result.err.splitlines()[:3]
        for line, token in zip(lines, chosen.tokens, strict=True):
            row = loaded.logits(tokens)[-1].astype(np.float64)
            logprob = row[token] - np.log(np.exp(row).sum())
            assert line.startswith(f"{loaded.tokenizer.token_name(token):<16} {logprob:8.3f}   ")
            tokens.append(token)


FILES = {
    b"": "holds no prompts",
    b"\n \r\n\n": "holds no prompts",
    b'{"prompt": "a"}\n{"prompt": \n': "line 2 is not JSON: Expecting value at column 12",
    b'{"prompt": "a"}\n\xff\n': "line 2 is not UTF-8 at byte 0",
    b"[1]\n": "line 1 is [1], but it must be an object",
    b'{"id": 3}\n': "line 1 must have either 'prompt' or 'messages'",
    b'{"prompt": "a", "messages": []}\n': "line 1 must have either 'prompt' or 'messages'",
    b'{"prompt": "a", "temperature": 1}\n': "line 1 has the field 'temperature'; the fields are",
    b'{"prompt": "a", "prompt": "b"}\n': "line 1 is not JSON that can be read: a field appears",
    b'{"prompt": 3}\n': "line 1: prompt is 3, but it must be text",
    b'{"prompt": ""}\n': "line 1: the prompt is empty",
    b'{"prompt": "a", "max_tokens": 0}\n': "line 1: max_tokens is 0",
    b'{"prompt": "a", "max_tokens": true}\n': "line 1: max_tokens is True",
    b'{"prompt": "a", "seed": -1}\n': "line 1: sampling.seed is -1",
    b'{"prompt": "a", "seed": 1.5}\n': "line 1: seed is 1.5, but it must be a whole number",
    b'{"prompt": "a", "id": NaN}\n': "line 1: id is nan, but it must be text or a whole number",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}\n": "line 1 is not JSON that can be read",
    b"[" * 100000: "line 1 is not JSON that can be read",
}
# Known only with the tokenizer, but before anything is run or written.
LATE = {
    b'{"prompt": "a"}\n{"messages": []}\n': "line 2: the conversation has no messages",
    b'{"prompt": "a"}\n{"messages": [{"role": "x"}]}\n': "line 2: message 0 has the role 'x'",
    b'{"prompt": "a"}\n{"messages": ["x"]}\n': "line 2: message 0 is 'x'",
    b'{"prompt": "a"}\n{"prompt": "a\\ud800"}\n': "line 2: the text",
    b'{"prompt": "a"}\n{"prompt": "' + b"word " * 3000 + b'"}\n': "line 2: The prompt has 3029",
    b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": "a"}], "raw": true}\n': (
        "line 2: A raw prompt is one text"
    ),
    b'{"messages": [{"role": "system", "content": "a"}], "system": "b"}\n': (
        "line 1: The chat has a system message"
    ),
}


class TestPromptFiles:
    @pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
    @pytest.mark.usefixtures("nothing_loads")
    def test_refused(self, refuses: Callable[..., None], tmp_path: Path, content: bytes) -> None:
        path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
        path.write_bytes(content)
        refuses([f"--prompt_file={path}", f"--output={output}"], "prompts.jsonl", FILES[content])
        assert not output.exists()

    @pytest.mark.parametrize("content", LATE, ids=range(len(LATE)))
    @pytest.mark.usefixtures("loaded")
    def test_refused_late(
        self, refuses: Callable[..., None], tmp_path: Path, content: bytes
    ) -> None:
        path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
        path.write_bytes(content)
        flags = [f"--prompt_file={path}", f"--output={output}", "--batch_size=1"]
        refuses(flags, "prompts.jsonl, ", LATE[content])
        assert not output.exists()

    @pytest.mark.usefixtures("nothing_loads")
    def test_output_is_checked_before_the_model_is_loaded(
        self, refuses: Callable[..., None], tmp_path: Path
    ) -> None:
        path = tmp_path / "prompts.txt"
        path.write_text("moon\n")
        kept = tmp_path / "kept.jsonl"
        kept.write_text("old")
        for output, words in (
            (kept, "kept.jsonl exists already"),
            (tmp_path, "exists already"),
            (tmp_path / "nowhere" / "out.jsonl", "can't be written: No such file or directory"),
            (path / "out.jsonl", "can't be written: Not a directory"),
            ("x" * 5000, "can't be written: File name too long"),
        ):
            refuses([f"--prompt_file={path}", f"--output={output}"], words)
        assert kept.read_text() == "old"

    def test_a_model_that_fails_leaves_no_output(
        self, refuses: Callable[..., None], tmp_path: Path
    ) -> None:
        path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        path.write_text("moon\n")
        refuses(["--model=nowhere", f"--prompt_file={path}", f"--output={output}"], "nowhere")
        assert not output.exists()

    @given(st.lists(st.binary(max_size=30) | st.sampled_from([b'{"prompt":', b'"a"', b"}", b"\n"])))
    @hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_bytes(self, tmp_path: Path, parts: list[bytes]) -> None:
        for name in ("prompts.jsonl", "prompts.txt"):
            path = tmp_path / name
            path.write_bytes(b"".join(parts))
            config = settings.get_config()
            config.prompt_file = str(path)
            try:
                items = prompts.read(config, prompts.options_of(config))
            except UserError as error:
                assert str(error).startswith(("--prompt_file=", str(path)))
            else:
                assert items

    @pytest.mark.usefixtures("loaded")
    def test_answers_are_those_of_the_prompts_alone(self, run: Run, tmp_path: Path) -> None:
        chat = [{"role": "user", "content": "moon"}]
        lines = [
            {"prompt": "Write a haiku about rivers.", "id": "é\ud800"},
            {"prompt": "moon", "id": None, "max_tokens": 5},
            {"messages": chat, "seed": 7},
            {"prompt": "An old silent pond", "raw": True, "max_tokens": 3},
            {"prompt": "Write a haiku about snow.", "system": "You write.", "id": 3},
        ]
        path = tmp_path / "prompts.jsonl"
        path.write_text("\ufeff" + "\r\n\n".join(map(json.dumps, lines)))
        written = []
        for size in (1, 2, 5):
            output = tmp_path / f"{size}.jsonl"
            flags = [f"--prompt_file={path}", f"--batch_size={size}", f"--output={output}"]
            result = run(*flags, "--temperature=0.9", "--seed=5")
            assert (result.code, result.out) == (0, "")
            written.append(output.read_text(encoding="utf-8").splitlines())
        # Batches decide in which order the answers finish, and nothing else.
        assert sorted(written[0]) == sorted(written[1]) == sorted(written[2])
        answers = [json.loads(line) for line in written[0]]
        assert [a["id"] for a in answers] == ["é\ud800", 3, 5, 7, 3]
        assert [len(a["tokens"]) for a in answers[1:4:2]] == [5, 3]
        # A seed of the line's own wins over its place in the file.
        (tmp_path / "one.jsonl").write_text(json.dumps({"messages": chat}))
        alone = run(f"--prompt_file={tmp_path / 'one.jsonl'}", "--temperature=0.9", "--seed=7")
        assert json.loads(alone.out)["text"] == answers[2]["text"]

    @pytest.mark.usefixtures("loaded")
    def test_samples_of_each_prompt(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"prompt": "moon"}\n{"prompt": "moon", "seed": 3, "id": "b"}\n')
        result = run(f"--prompt_file={path}", "--n=2", "--temperature=1", "--seed=3")
        answers = [json.loads(line) for line in result.out.splitlines()]
        assert [(a["id"], a["sample"]) for a in answers] == [(1, 0), (1, 1), ("b", 0), ("b", 1)]
        texts = [a["text"] for a in answers]
        assert texts[:2] == texts[2:] and texts[0] != texts[1]

    @pytest.mark.usefixtures("loaded")
    def test_lines_of_text_and_logprobs(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "prompts.txt"
        path.write_text("moon\n\n  snow\n")
        result = run(f"--prompt_file={path}", "--top_logprobs=2", "--max_tokens=4")
        first, second = map(json.loads, result.out.splitlines())
        assert (first["id"], second["id"]) == (1, 3)
        assert [entry["token"] for entry in first["logprobs"]] == first["tokens"]
        for entry in first["logprobs"]:
            (best, logprob), (_, runner_up) = entry["top"]
            assert (best, logprob) == (entry["token"], entry["logprob"])
            assert runner_up <= logprob < 0


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.usefixtures("loaded")
class TestStreams:
    @pytest.mark.parametrize("argv", [[], ["inspect"], ["--help"], ["--n=2"]])
    def test_a_reader_that_has_gone(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", pipe_without_reader())
            result = run(*argv)
            sys.stdout.close()
        assert result.code == 0
        assert "error" not in result.err

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
    @pytest.mark.parametrize("argv", [[], ["inspect"], ["--help"]])
    def test_a_full_disk(self, run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
            result = run(*argv)
            sys.stdout.close()
        assert result.code == 2
        assert result.err.endswith(f"error: [Errno {errno.ENOSPC}] No space left on device\n")

    def test_closed_streams(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("stdin", "stdout", "stderr"):
            with monkeypatch.context() as patch:
                patch.setattr(sys, name, None)
                assert run("--prompt=-" if name == "stdin" else "--max_tokens=1").code in (0, 2)

    def test_utf8_in_an_ascii_locale(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        content = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
            assert run("--prompt=Write a haiku about é.").code == 0
            assert "é" in content.getvalue().decode("utf-8")

    def test_inspect_writes_all_or_nothing(
        self, refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise UserError("there is a problem.")

        monkeypatch.setattr("qwen_jax.tasks.inspect.memory_lines", fail)
        refuses(["inspect"], "there is a problem")


class TestInterrupts:
    def test_while_loading(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        path.write_text("moon\n")
        monkeypatch.setattr(loader, "decode_into", lambda *args: signal.raise_signal(2))
        result = run(f"--prompt_file={path}", f"--output={output}")
        assert result == Result(130, "", "interrupted\n")
        assert not output.exists()

    @pytest.mark.parametrize("step", ["prefill", "decode_many"])
    def test_while_generating(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, loaded: api.Model, step: str
    ) -> None:
        real, calls = getattr(loaded.engine, step), []

        def interrupted(*args: object) -> object:
            calls.append(args)
            if len(calls) == (1 if step == "prefill" else 3):
                signal.raise_signal(signal.SIGINT)
            return real(*args)

        monkeypatch.setattr(loaded.engine, step, interrupted)
        result = run()
        assert result.code == 130
        assert result.err.endswith("interrupted\n")
        if step == "prefill":
            assert result.out == "" and result.err == "interrupted\n"
        else:
            text = result.out.removesuffix("\n")
            assert result.out.endswith("\n") and 0 < len(text) < len(HAIKU)
            assert HAIKU.startswith(text)
            assert "finished    interrupted" in result.err

    def test_what_a_prompt_file_has_answered_is_kept(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, loaded: api.Model, tmp_path: Path
    ) -> None:
        real, calls = loaded.engine.prefill, []

        def interrupted(*args: object) -> object:
            calls.append(args)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)
            return real(*args)

        monkeypatch.setattr(loaded.engine, "prefill", interrupted)
        path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        path.write_text("moon\nsnow\nriver\npond\n")
        result = run(f"--prompt_file={path}", f"--output={output}", "--batch_size=1")
        assert (result.code, result.out) == (130, "")
        assert "finished    stop 2" in result.err and result.err.endswith("interrupted\n")
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        assert [answer["id"] for answer in answers] == [1, 2]

    def test_while_importing(self) -> None:
        program = (
            "import signal; from qwen_jax import interrupts\n"
            "with interrupts.handled_by(interrupts.exit_at_once): signal.raise_signal(2)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")

    @pytest.mark.parametrize(("result", "code"), [("2", 2), ("130", 130)])
    def test_the_process_ends_without_more_ado(self, result: str, code: int) -> None:
        """After Ctrl-C, which may have stopped XLA midway, nothing of Python's end is run."""
        program = (
            "import atexit, sys; from qwen_jax import cli\n"
            "def main():\n"
            f"    print('text', end=''); return {result}\n"
            "cli.main = main; atexit.register(lambda: print(', end', end='')); cli.entry()"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == code
        assert done.stdout == ("text" if code == 130 else "text, end")

    def test_in_a_callback_that_would_swallow_it(self) -> None:
        finished = []

        def _xla_gc_callback() -> None:
            signal.raise_signal(signal.SIGINT)
            finished.append(True)

        with (
            pytest.raises(KeyboardInterrupt),
            interrupts.handled_by(interrupts.raise_interrupt),
        ):
            _xla_gc_callback()
            for _ in range(1000):  # one long sleep would not end
                time.sleep(0.01)
        assert finished == [True]

    def test_ignored_signals_stay_ignored(self) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with interrupts.handled_by(interrupts.exit_at_once):
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)


def test_the_console_command_is_run_py() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="qwen-jax")
    assert entry.load() is runpy.run_path(str(REPOSITORY / "run.py"))["entry"] is cli.entry


def test_nothing_is_written_into_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests run without a compilation cache; `api.load` must not switch it on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    api.load()
    assert not list(tmp_path.iterdir())
    assert not jax.config.values["jax_compilation_cache_dir"]
