"""What the tests share: the repository on the path, no network, and tiny models that transformers built."""

import gc
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub client: no test may reach the network
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: on models this small, threads only cost
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels

# whoever begins one of these last keeps the others waiting, so that they begin first
LONGEST_FILES = ["train", "distributed", "answers", "lora", "plan", "grader", "memory", "fuzz", "difficulty", "evaluation"]


@pytest.fixture(autouse=True)
def no_signal_ends_the_tests(monkeypatch):
    """A program that a test runs in this process exits with 128 + the signal's number."""
    monkeypatch.setattr("engine.distributed.end_by_signal", lambda number: None)


def pytest_collection_modifyitems(items):
    """Files in the order in which pytest.ini has them handed out."""
    first = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_collection_finish():
    """Leave what imports made out of every later search for garbage: it is there to stay, and very much."""
    gc.freeze()


WINDOW = 256
VOCABULARY = 97
SCALINGS = {
    "plain": {"rope_type": "default"},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    },
    "warm yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def tiny_reference(family: str, tied: bool = True, scaling: str = "plain", **overrides):
    """A transformers model of a family with random weights, in which no bias is zero and no norm is one."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": 10_000.0, **SCALINGS[scaling]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family != "qwen2":
        sizes["head_dim"] = 16  # not hidden_size / heads, as in Qwen3
    generator = torch.Generator().manual_seed(1)
    model = model_class(config_class(**sizes | overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function from (family, tied, scaling) to a saved folder; each is made once."""
    made: dict[tuple, Path] = {}

    def make(family: str = "qwen3", tied: bool = True, scaling: str = "plain") -> Path:
        key = family, tied, scaling
        if key not in made:
            made[key] = tmp_path_factory.mktemp("-".join(map(str, key)).replace(" ", "-"))
            tiny_reference(*key).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A laptop world of a few problems with a raw model of one layer."""
    from lab.arithmetic import World, write_world

    folder = tmp_path_factory.mktemp("worlds") / "world"
    sizes = {"sft_problems": 1, "train_problems": 5, "held_out_problems": 6, "beyond_problems": 1, "trained_tokens": 30}
    write_world(World(**sizes, hidden_size=32, layers=1, window=96), folder)
    return folder
