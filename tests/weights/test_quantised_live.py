"""FP8 directories against transformers, which dequantises them on a CPU as it loads them."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="live parity needs pip install '.[parity]'")
pytest.importorskip("transformers", reason="live parity needs pip install '.[parity]'")

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.quantised_checkpoints import fp8, write_quantised
from tests.tiny_checkpoints import canonical, random_parameters, tiny_config

pytestmark = pytest.mark.live

SEED = int(os.environ["QWEN_JAX_LIVE_SEED"])


def test_blocks_of_float8(tmp_path: Path) -> None:
    config = tiny_config(num_layers=1, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=384)
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    params = random_parameters(config, SEED % 1000)
    write_quantised(tmp_path, config, params, fp8(), settings, dtype="F32", seed=SEED)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    theirs.pop("lm_head.weight")  # tied
    ours = load_parameters(open_checkpoint(tmp_path), "float32")
    for name, values in canonical(theirs).items():
        np.testing.assert_array_equal(np.asarray(ours[name]), values, err_msg=name)
