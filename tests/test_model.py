"""The decoder equals transformers; packing, chunks of logits and recomputation change no number."""

import json
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SCALINGS, VOCABULARY, WINDOW, tiny_reference
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from lab.export import export_arguments, main
from model import (
    ModelError,
    Packed,
    TokenLogprobs,
    Transformer,
    extend_window,
    initialise,
    load,
    parse_config,
    read_config,
)
from yarn import Yarn

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["qwen3", "qwen2", "llama"]


def random_tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_logits(model: Transformer, *sequences: torch.Tensor) -> torch.Tensor:
    """Compute logits (T, V) of sequences packed into one row."""
    return model.logits(model.hidden(torch.cat(sequences), Packed([len(x) for x in sequences])))


@torch.no_grad()
def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Compute transformers' logits (T, V) of one sequence with the model in a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def tiny_config(family: str = "qwen3", **changes) -> dict:
    return tiny_reference(family).config.to_dict() | changes


# ------------------------------------------------------------------------------- the same logits as transformers


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(checkpoint, family, tied, scaling):
    folder = checkpoint(family, tied, scaling)
    tokens = random_tokens(WINDOW)
    ours, theirs = our_logits(load(folder), tokens), their_logits(folder, tokens)
    assert theirs.std() > 0.5  # logits that are almost constant would prove nothing
    assert difference(ours, theirs) < 2e-5


@pytest.mark.parametrize("scaling", ["yarn", "warm yarn", "llama3"])
def test_scaling_changes_the_logits(checkpoint, scaling):
    """The equality above would also hold if both sides ignored the scaling."""
    tokens = random_tokens(WINDOW)
    plain = load(checkpoint())
    before = our_logits(plain, tokens)
    plain.set_rope(read_config(checkpoint("qwen3", True, scaling)).rope)
    assert difference(our_logits(plain, tokens), before) > 0.01


# --------------------------------------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_does_not_change_the_logits_of_a_sequence(checkpoint, family):
    model = load(checkpoint(family))
    sequences = [random_tokens(n, seed=n) for n in (1, 40, 39, 7, 100, 1, 2)]
    packed = our_logits(model, *sequences).split([len(x) for x in sequences])
    for sequence, logits in zip(sequences, packed, strict=True):
        assert difference(logits, our_logits(model, sequence)) < 1e-5


# --------------------------------------------------------------------------------------- log-probs and gradients


def scoring_batch(lengths=(9, 1, 23, 14), prompt=1):
    """Return tokens, lengths, positions that predict, their targets, and a temperature per target."""
    sequences = [random_tokens(n, seed=n) for n in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    predict = torch.cat([torch.arange(s + prompt - 1, s + n - 1) for s, n in zip(starts, lengths, strict=False)])
    tokens = torch.cat(sequences)
    temperature = 0.5 + torch.rand(len(predict), generator=torch.Generator().manual_seed(3))
    return tokens, list(lengths), predict, tokens[predict + 1], temperature


def naive_logprobs(model, tokens, lengths, predict, targets, temperature):
    logits = model.logits(model.hidden(tokens, Packed(lengths)))
    scaled = logits[predict] / torch.as_tensor(temperature).expand(len(predict))[:, None]
    return F.log_softmax(scaled, 1)[torch.arange(len(predict)), targets]


def gradients(model, logprobs) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 2, len(logprobs))
    (logprobs * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()  # not before backward: until then FSDP shows gathered parameters
    return found


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen2", False), ("llama", True)])
def test_logprobs_and_gradients_equal_the_naive_ones(checkpoint, monkeypatch, family, tied, chunk):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", chunk * 4 * VOCABULARY)
    model = load(checkpoint(family, tied))
    tokens, lengths, predict, targets, temperature = scoring_batch()
    ours = model(tokens, Packed(lengths), predict, targets, temperature)
    naive = naive_logprobs(model, tokens, lengths, predict, targets, temperature)
    assert ours.dtype == torch.float32 and difference(ours, naive) < 1e-5
    our_gradients, naive_gradients = gradients(model, ours), gradients(model, naive)
    for name, gradient in naive_gradients.items():
        assert gradient.abs().max() > 0
        assert difference(our_gradients[name], gradient) < 1e-4 * max(1, gradient.abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
def test_one_temperature_equals_the_same_temperature_for_each_target(checkpoint, temperature):
    model = load(checkpoint())
    tokens, lengths, predict, targets, _ = scoring_batch()
    with torch.no_grad():
        for_all = model(tokens, Packed(lengths), predict, targets, temperature)
        for_each = model(tokens, Packed(lengths), predict, targets, torch.full((len(predict),), temperature))
        naive = naive_logprobs(model, tokens, lengths, predict, targets, temperature)
    assert torch.equal(for_all, for_each) and difference(for_all, naive) < 1e-5


class LiveLogits(TorchDispatchMode):
    """Count the peak of elements alive in tensors as wide as the vocabulary; views count once."""

    def __init__(self, head: torch.Tensor):
        super().__init__()
        self.head, self.live, self.most = head, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        wide = isinstance(found, torch.Tensor) and found.dim() == 2 and found.shape[1] == len(self.head)
        if wide and found.data_ptr() != self.head.data_ptr():  # not the head itself, transposed
            storage = found.untyped_storage()
            self.live[storage.data_ptr()] = weakref.ref(storage), storage.nbytes() // found.element_size()
        self.live = {pointer: held for pointer, held in self.live.items() if held[0]() is not None}
        self.most = max(self.most, sum(elements for _, elements in self.live.values()))
        return found


@pytest.mark.parametrize("frozen", [False, True])
def test_at_most_one_chunk_of_logits_is_alive(checkpoint, monkeypatch, frozen):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model = load(checkpoint("qwen3", False))
    model.lm_head.weight.requires_grad_(not frozen)
    tokens, lengths, predict, targets, temperature = scoring_batch()
    with LiveLogits(model.lm_head.weight) as logits:
        model(tokens, Packed(lengths), predict, targets, temperature).sum().backward()
    assert logits.most == 5 * VOCABULARY
    with LiveLogits(model.lm_head.weight) as logits:
        naive_logprobs(model, tokens, lengths, predict, targets, temperature).sum().backward()
    assert logits.most > 2 * len(predict) * VOCABULARY  # the counter counts


def head_inputs(positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return hidden states, a head with widely spread logits, targets, and a temperature per target."""
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 24, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (positions,), generator=generator)
    return hidden, weight, targets, 0.5 + torch.rand(positions, generator=generator)


def whole_logprobs(hidden, weight, targets, temperature):
    """Compute log-probs with plain autograd over all logits at once."""
    return ((hidden @ weight.T) / temperature[:, None]).log_softmax(1)[torch.arange(len(targets)), targets]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("positions", [1, 7, 64])
def test_chunked_logprobs_equal_plain_autograd(monkeypatch, positions, rows, frozen):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", rows * 4 * VOCABULARY)
    hidden, weight, targets, temperature = head_inputs(positions)
    weight.requires_grad_(not frozen)
    inputs = [hidden] if frozen else [hidden, weight]
    upstream = torch.linspace(-2, 3, positions)
    wanted = whole_logprobs(hidden, weight, targets, temperature)
    found = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    wanted = torch.autograd.grad(wanted, inputs, upstream)
    for ours, plain in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        assert plain.norm() > 0 and relative(ours, plain) < 1e-5


def test_logprobs_of_no_targets_have_zero_gradients():
    hidden, weight, targets, temperature = head_inputs(0)
    found = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad.shape == (0, 24) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_logprobs_equal_float32_unless_the_logits_are_rounded(monkeypatch):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", 2 * 4 * VOCABULARY)
    hidden, weight, targets, temperature = head_inputs(600, torch.bfloat16)
    wanted = whole_logprobs(hidden.float(), weight.float(), targets, temperature)
    of_hidden, of_weight = torch.autograd.grad(wanted.sum(), [hidden, weight])
    exact = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    rounded = TokenLogprobs.apply(hidden, weight, targets, temperature, False)
    assert exact.dtype == torch.float32 and difference(exact, wanted) < 1e-4 < 1e-2 < difference(rounded, wanted)
    ours = torch.autograd.grad(exact.sum(), [hidden, weight])
    assert relative(ours[0], of_hidden) < 5e-3
    assert relative(ours[1], of_weight) < 5e-3  # a bfloat16 sum of 300 chunks would be several times further off
    weight.requires_grad_(False)
    frozen = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    assert torch.equal(frozen, exact) and relative(torch.autograd.grad(frozen.sum(), hidden)[0], of_hidden) < 5e-3


@pytest.mark.parametrize("float32_head", [True, False])
def test_sampler_and_trainer_use_the_same_bfloat16_logits(checkpoint, float32_head):
    model = load(checkpoint(), dtype=torch.bfloat16)
    model.float32_head = float32_head
    tokens, lengths, predict, targets, temperature = scoring_batch()
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens, Packed(lengths)).index_select(0, predict))
        assert logits.dtype == (torch.float32 if float32_head else torch.bfloat16)
        wanted = (logits.float() / temperature[:, None]).log_softmax(1)[torch.arange(len(predict)), targets]
        assert difference(model(tokens, Packed(lengths), predict, targets, temperature), wanted) < 1e-5


def test_recompute_gives_the_same_gradients_and_runs_each_layer_again(checkpoint):
    model = load(checkpoint())
    batch = scoring_batch()
    calls = Counter()
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.update(forwards=1))
    plain = gradients(model, model(batch[0], Packed(batch[1]), *batch[2:]))
    assert calls["forwards"] == 1
    for layer in model.model.layers:
        layer.recompute = True
    recomputed = gradients(model, model(batch[0], Packed(batch[1]), *batch[2:]))
    assert calls["forwards"] == 3
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


# ------------------------------------------------------------------------------------------------- fresh weights


def fresh(seed: int) -> Transformer:
    model = Transformer(parse_config(tiny_config()))
    initialise(model, seed)
    return model


def test_initialise_depends_on_its_seed_alone():
    one, same, other = fresh(1), fresh(1), fresh(2)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert name.endswith("norm.weight") or not torch.equal(a, c)


def test_initialise_neither_reads_nor_advances_the_global_generator():
    one = fresh(1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = fresh(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    torch.set_rng_state(before)
    initialise(one, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_have_the_documented_std_and_predict_nearly_uniformly():
    model = fresh(1)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert parameters["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert parameters["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)
    assert torch.equal(parameters["model.norm.weight"], torch.ones(48))
    logprobs = our_logits(model, random_tokens(50)).log_softmax(1)
    assert logprobs.min() > -torch.tensor(VOCABULARY).log() - 1.5


# ------------------------------------------------------------------------------------------------------ the export


def export(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "model.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line_exports_a_config_with_the_scaling(checkpoint, tmp_path):
    folder = checkpoint("qwen2", False)
    done = export(folder, tmp_path / "out", "--yarn", 1.5, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_position_embeddings"] == 384
    expected = {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": WINDOW, "attention_factor": 1.0}
    assert expected.items() <= config["rope_scaling"].items() and expected.items() <= config["rope_parameters"].items()
    tokens = random_tokens(380)
    expected_model = load(folder)
    expected_model.set_rope(extend_window(expected_model.config, 1.5).rope)
    assert difference(our_logits(expected_model, tokens), their_logits(tmp_path / "out", tokens)) < 2e-5
    assert torch.equal(our_logits(expected_model, tokens), our_logits(load(tmp_path / "out"), tokens))
    plain = our_logits(load(folder), tokens)
    assert difference(our_logits(expected_model, tokens), plain) > 0.01


def test_command_line_errors_are_one_sentence_and_nothing_is_written(checkpoint, tmp_path):
    """Call main in this process, since a process for each case would take seconds."""
    folder, scaled, out = checkpoint(), checkpoint("qwen3", True, "yarn"), tmp_path / "out"
    (tmp_path / "taken").mkdir()
    for arguments, sentence in [
        ((tmp_path / "nowhere", out), "no such model folder"),
        ((tmp_path / "taken", out), "no config.json"),
        ((folder, tmp_path / "taken"), "exists already"),
        ((folder, out, "--yarn", 1.0), "must be above 1"),
        ((folder, out, "--yarn", 0), "must be above 1"),
        ((scaled, out, "--yarn", 1.5), "already has Yarn"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(export_arguments([*map(str, arguments)]))
        message = stopped.value.code
        assert message.startswith("model.py: ") and sentence in message and "\n" not in message
        assert [file.name for file in tmp_path.iterdir()] == ["taken"] and not list((tmp_path / "taken").iterdir())


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["MODEL", "OUT", "--yarn=much"], 2), (["MODEL"], 2)])
def test_help_and_usage_errors_do_not_import_torch(arguments, status):
    """Regression: they took seconds, for the import of torch."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "model.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and "usage: model.py" in done.stdout + done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and "torch" not in imported


def test_extend_window_sets_every_parameter(checkpoint):
    extended = extend_window(read_config(checkpoint()), 1.5, original_window=128, attention_factor=1.1)
    assert extended.rope.scaling == Yarn(1.5, 128, 1.1, 32.0, 1.0)
    assert extended.max_position_embeddings == 192
    ramped = extend_window(read_config(checkpoint()), 1.5, beta_fast=2.0, beta_slow=0.5)
    assert (ramped.rope.scaling.beta_fast, ramped.rope.scaling.beta_slow) == (2.0, 0.5)
    with pytest.raises(ModelError, match="beta_fast > beta_slow > 0"):
        extend_window(read_config(checkpoint()), 1.5, beta_fast=1.0)
