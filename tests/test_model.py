"""The hand-written decoder equals transformers; loading is strict; saving, packing, FSDP2 change no number."""

import json
import random
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SCALINGS, VOCABULARY, WINDOW, tiny_reference
from forked import in_processes
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from model import (
    ModelError,
    Packed,
    TokenLogprobs,
    Transformer,
    extend_window,
    gathered,
    initialise,
    load,
    packed_attention,
    padded_runs,
    parse_config,
    read_config,
    save,
    shard,
)
from yarn import Yarn

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["qwen3", "qwen2", "llama"]


def random_tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_logits(model: Transformer, *sequences: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of sequences packed into one row."""
    return model.logits(model.hidden(torch.cat(sequences), Packed([len(x) for x in sequences])))


@torch.no_grad()
def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits (T, V) of one sequence, from a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def rewrite(folder: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with `change` applied to its dict of tensors."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# ------------------------------------------------------------------------------- the same logits as transformers


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(checkpoint, family, tied, scaling):
    folder = checkpoint(family, tied, scaling)
    tokens = random_tokens(WINDOW)
    ours, theirs = our_logits(load(folder), tokens), their_logits(folder, tokens)
    assert theirs.std() > 0.5  # logits that could not tell one model from another would prove nothing
    assert difference(ours, theirs) < 2e-5


@pytest.mark.parametrize("scaling", ["yarn", "warm yarn", "llama3"])
def test_scaling_changes_the_logits(checkpoint, scaling):
    """The equality above would also hold if both sides ignored the scaling: they do not."""
    tokens = random_tokens(WINDOW)
    plain = load(checkpoint())
    before = our_logits(plain, tokens)
    plain.set_rope(read_config(checkpoint("qwen3", True, scaling)).rope)
    assert difference(our_logits(plain, tokens), before) > 0.01


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_in_transformers_with_the_same_logits(checkpoint, tmp_path, family, tied, scaling):
    model = load(checkpoint(family, tied, scaling))
    save(model, tmp_path / "out")
    tokens = random_tokens(100)
    assert difference(our_logits(model, tokens), their_logits(tmp_path / "out", tokens)) < 2e-5
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tied", [True, False])
def test_saved_in_shards_loads_in_transformers_and_here(checkpoint, tmp_path, monkeypatch, tied):
    monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    model = load(checkpoint("qwen2", tied))
    save(model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    tokens = random_tokens(50)
    assert difference(our_logits(model, tokens), their_logits(tmp_path / "out", tokens)) < 2e-5
    assert torch.equal(our_logits(load(tmp_path / "out"), tokens), our_logits(model, tokens))


def test_sharded_checkpoint_of_transformers_loads(tmp_path, checkpoint):
    tiny_reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = random_tokens(50)
    assert torch.equal(our_logits(load(tmp_path), tokens), our_logits(load(checkpoint("llama")), tokens))


def test_rotary_buffers_in_old_checkpoints_are_ignored(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(rewrite(checkpoint(), tmp_path / "old", lambda tensors: tensors.update({name: torch.ones(8)})))


def test_bfloat16_saves_and_loads_as_bfloat16(checkpoint, tmp_path):
    save(load(checkpoint()), tmp_path / "out", torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype for x in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert load(tmp_path / "out", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ strict loading, saving


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor_is_named(checkpoint, tmp_path, name):
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(rewrite(checkpoint(), tmp_path / "bad", lambda tensors: tensors.pop(name)))


def test_missing_lm_head_of_an_untied_model_is_named(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="lm_head.weight is missing"):
        load(rewrite(checkpoint("qwen3", False), tmp_path / "bad", lambda tensors: tensors.pop("lm_head.weight")))


def test_surplus_tensor_is_named(checkpoint, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"{name} is not part of this model"):
        load(rewrite(checkpoint(), tmp_path / "bad", lambda tensors: tensors.update({name: torch.ones(2)})))


def test_misshaped_tensor_is_named_with_both_shapes(checkpoint, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(1)  # of a shape that would broadcast

    with pytest.raises(ModelError, match=r"model.norm.weight has shape \(1,\), the config says \(48,\)"):
        load(rewrite(checkpoint(), tmp_path / "bad", change))


def test_equal_lm_head_copy_in_a_tied_checkpoint_is_fine(checkpoint, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tokens = random_tokens(20)
    copied = load(rewrite(checkpoint(), tmp_path / "copy", change))
    assert torch.equal(our_logits(copied, tokens), our_logits(load(checkpoint()), tokens))


def test_different_lm_head_in_a_tied_checkpoint_is_an_error(checkpoint, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(ModelError, match="tie_word_embeddings is true but lm_head.weight is another tensor"):
        load(rewrite(checkpoint(), tmp_path / "bad", change))


def test_missing_shard_is_an_error(tmp_path):
    tiny_reference("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-of-*")).unlink()
    with pytest.raises(ModelError, match="model-00002-of-.*cannot be read"):
        load(tmp_path)


def test_truncated_weights_are_an_error(checkpoint, tmp_path):
    folder = rewrite(checkpoint(), tmp_path / "bad", lambda tensors: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)


def test_folder_without_config_or_weights_is_an_error(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((checkpoint() / "config.json").read_text())
    with pytest.raises(ModelError, match="no model.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "no-such-folder", "a/b/c"])
def test_no_such_folder_is_an_error(name):
    with pytest.raises(ModelError, match="no such model folder"):
        load(name)


def test_unreachable_hub_id_is_one_sentence():
    with pytest.raises(ModelError, match="^nobody/nothing: not a local folder, and the hub did not give it [^\n]+$"):
        load("nobody/nothing")


def test_save_refuses_an_existing_folder_and_leaves_it_alone(checkpoint, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        save(load(checkpoint()), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_save_copies_the_tokenizer_files(checkpoint, tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from/tokenizer.json").write_text("{}")
    (tmp_path / "from/chat_template.jinja").write_text("hello")
    (tmp_path / "from/notes.txt").write_text("not a tokenizer file")
    save(load(checkpoint()), tmp_path / "out", tokenizer_from=tmp_path / "from")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


# ------------------------------------------------------------------------------------------------- bad configs


def tiny_config(family: str = "qwen3", **changes) -> dict:
    return tiny_reference(family).config.to_dict() | changes


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not supported"),
    ],
)
def test_config_of_another_model_is_refused(changes, said):
    with pytest.raises(ModelError, match="^x/config.json: [^\n]+$") as error:
        parse_config(tiny_config(**changes), "x/config.json")
    assert said in str(error.value)


def test_mlp_bias_of_llama_is_refused():
    with pytest.raises(ModelError, match="mlp_bias"):
        parse_config(tiny_config("llama", mlp_bias=True))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_config_without_a_size_is_refused_by_name(key):
    source = tiny_config()
    del source[key]
    with pytest.raises(ModelError, match=f"the key '{key}' is missing"):
        parse_config(source)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_a_sliding_window_that_is_off_is_fine(family):
    source = tiny_config(family, use_sliding_window=False, sliding_window=32, layer_types=["full_attention"] * 2)
    assert parse_config(source).model_type == family


def test_notes_about_yarn_are_shown(capsys):
    scaling = {"rope_type": "yarn", "factor": 1.5, "attn_factor": 1.0}
    parse_config(tiny_config(rope_parameters=None, rope_scaling=scaling), "x/config.json")
    assert "x/config.json: YaRN: \"attn_factor\": 1.0 is read as attention_factor" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- packed sequences, attention


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_batch_gives_each_sequence_the_logits_it_has_alone(checkpoint, family):
    model = load(checkpoint(family))
    sequences = [random_tokens(n, seed=n) for n in (1, 40, 39, 7, 100, 1, 2)]
    packed = our_logits(model, *sequences).split([len(x) for x in sequences])
    for sequence, logits in zip(sequences, packed, strict=True):
        assert difference(logits, our_logits(model, sequence)) < 1e-5


def naive_attention(q, k, v, lengths):
    """Masked softmax, one sequence and one head at a time."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for q_s, k_s, v_s in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = []
        for h in range(q.shape[1]):
            scores = q_s[:, h] @ k_s[:, h // group].T / q.shape[2] ** 0.5
            mask = torch.ones_like(scores).tril() == 0
            heads.append(scores.masked_fill(mask, float("-inf")).softmax(1) @ v_s[:, h // group])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[1], [5, 9, 1, 30, 2, 31], [40, 40, 39], [1] * 7])
def test_packed_attention_equals_a_naive_masked_softmax(lengths, heads, key_heads):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), n, 8) for n in (heads, key_heads, key_heads)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    assert difference(packed_attention(q, k, v, Packed(lengths)), naive_attention(q, k, v, lengths)) < 1e-5


@pytest.mark.parametrize("most_padding", [0.0, 0.25, 0.6])
def test_padded_runs_keep_every_token_once_and_bound_the_padding(most_padding):
    shuffle = random.Random(7)
    for _ in range(100):
        lengths = [shuffle.choice([1, 2, 3, shuffle.randint(1, 50)]) for _ in range(shuffle.randint(1, 20))]
        kept = []
        for run in padded_runs(lengths, "cpu", most_padding):
            longest = len(run.gather) // run.rows
            assert len(run.keep) >= (1 - most_padding) * len(run.gather)
            row_of_cell = run.keep // longest
            for row in range(run.rows):  # a row is one whole sequence from its start, then padding
                tokens = run.gather[run.keep[row_of_cell == row]].tolist()
                start = sum(lengths[: lengths_done(kept, lengths)])
                assert tokens == list(range(start, start + len(tokens)))
                kept.extend(tokens)
                assert run.keep[row_of_cell == row].tolist() == [row * longest + i for i in range(len(tokens))]
        assert kept == list(range(sum(lengths)))


def lengths_done(kept: list[int], lengths: list[int]) -> int:
    """How many whole sequences the kept tokens make."""
    done, tokens = 0, len(kept)
    while tokens:
        tokens -= lengths[done]
        done += 1
    return done


# --------------------------------------------------------------------------------------- log-probs and gradients


def scored(lengths=(9, 1, 23, 14), prompt=1):
    """Tokens of packed sequences, the packed positions that predict, what they predict, and a temperature for each."""
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
    model.zero_grad()  # not before backward: FSDP shows its gathered parameters until then
    return found


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen2", False), ("llama", True)])
def test_logprobs_and_gradients_equal_the_naive_ones(checkpoint, monkeypatch, family, tied, chunk):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", chunk * 4 * VOCABULARY)
    model = load(checkpoint(family, tied))
    tokens, lengths, predict, targets, temperature = scored()
    ours = model(tokens, Packed(lengths), predict, targets, temperature)
    naive = naive_logprobs(model, tokens, lengths, predict, targets, temperature)
    assert ours.dtype == torch.float32 and difference(ours, naive) < 1e-5
    our_gradients, naive_gradients = gradients(model, ours), gradients(model, naive)
    for name, gradient in naive_gradients.items():
        assert gradient.abs().max() > 0
        assert difference(our_gradients[name], gradient) < 1e-4 * max(1, gradient.abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.4])
def test_one_temperature_for_all_is_the_same_as_one_for_each(checkpoint, temperature):
    model = load(checkpoint())
    tokens, lengths, predict, targets, _ = scored()
    with torch.no_grad():
        for_all = model(tokens, Packed(lengths), predict, targets, temperature)
        for_each = model(tokens, Packed(lengths), predict, targets, torch.full((len(predict),), temperature))
        naive = naive_logprobs(model, tokens, lengths, predict, targets, temperature)
    assert torch.equal(for_all, for_each) and difference(for_all, naive) < 1e-5


class LiveLogits(TorchDispatchMode):
    """The most elements, in tensors as wide as the vocabulary, that were alive at once; views count once."""

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
def test_no_more_than_a_chunk_of_logits_exists_at_once(checkpoint, monkeypatch, frozen):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model = load(checkpoint("qwen3", False))
    model.lm_head.weight.requires_grad_(not frozen)
    tokens, lengths, predict, targets, temperature = scored()
    with LiveLogits(model.lm_head.weight) as logits:
        model(tokens, Packed(lengths), predict, targets, temperature).sum().backward()
    assert logits.most == 5 * VOCABULARY
    with LiveLogits(model.lm_head.weight) as logits:
        naive_logprobs(model, tokens, lengths, predict, targets, temperature).sum().backward()
    assert logits.most > 2 * len(predict) * VOCABULARY  # what is counted is what there is


def head_case(positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states and a head whose logits spread widely, with targets and a temperature for each."""
    random_ = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 24, generator=random_).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 24, generator=random_).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (positions,), generator=random_)
    return hidden, weight, targets, 0.5 + torch.rand(positions, generator=random_)


def whole_logprobs(hidden, weight, targets, temperature):
    """Plain autograd over all logits at once."""
    return ((hidden @ weight.T) / temperature[:, None]).log_softmax(1)[torch.arange(len(targets)), targets]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("positions", [1, 7, 64])
def test_chunked_logprobs_equal_plain_autograd(monkeypatch, positions, rows, frozen):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", rows * 4 * VOCABULARY)
    hidden, weight, targets, temperature = head_case(positions)
    weight.requires_grad_(not frozen)
    inputs = [hidden] if frozen else [hidden, weight]
    upstream = torch.linspace(-2, 3, positions)
    wanted = whole_logprobs(hidden, weight, targets, temperature)
    found = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    wanted = torch.autograd.grad(wanted, inputs, upstream)
    for ours, plain in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        assert plain.norm() > 0 and relative(ours, plain) < 1e-5


def test_logprobs_of_nothing_have_a_gradient_of_zero():
    hidden, weight, targets, temperature = head_case(0)
    found = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad.shape == (0, 24) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_logprobs_are_those_of_float32_unless_the_logits_are_rounded(monkeypatch):
    monkeypatch.setattr(model_file, "LOGIT_CHUNK_BYTES", 2 * 4 * VOCABULARY)
    hidden, weight, targets, temperature = head_case(600, torch.bfloat16)
    wanted = whole_logprobs(hidden.float(), weight.float(), targets, temperature)
    of_hidden, of_weight = torch.autograd.grad(wanted.sum(), [hidden, weight])
    exact = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    rounded = TokenLogprobs.apply(hidden, weight, targets, temperature, False)
    assert exact.dtype == torch.float32 and difference(exact, wanted) < 1e-4 < 1e-2 < difference(rounded, wanted)
    ours = torch.autograd.grad(exact.sum(), [hidden, weight])
    assert relative(ours[0], of_hidden) < 5e-3
    assert relative(ours[1], of_weight) < 5e-3  # 300 chunks added in bfloat16 would be several times as far off
    weight.requires_grad_(False)
    frozen = TokenLogprobs.apply(hidden, weight, targets, temperature, True)
    assert torch.equal(frozen, exact) and relative(torch.autograd.grad(frozen.sum(), hidden)[0], of_hidden) < 5e-3


@pytest.mark.parametrize("float32_head", [True, False])
def test_sampler_and_trainer_read_the_same_bfloat16_logits(checkpoint, float32_head):
    model = load(checkpoint(), dtype=torch.bfloat16)
    model.float32_head = float32_head
    tokens, lengths, predict, targets, temperature = scored()
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens, Packed(lengths)).index_select(0, predict))
        assert logits.dtype == (torch.float32 if float32_head else torch.bfloat16)
        wanted = (logits.float() / temperature[:, None]).log_softmax(1)[torch.arange(len(predict)), targets]
        assert difference(model(tokens, Packed(lengths), predict, targets, temperature), wanted) < 1e-5


def test_recompute_gives_the_same_gradients_and_runs_each_layer_again(checkpoint):
    model = load(checkpoint())
    batch = scored()
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


def test_initialise_is_fixed_by_its_seed():
    one, same, other = fresh(1), fresh(1), fresh(2)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert name.endswith("norm.weight") or not torch.equal(a, c)


def test_initialise_neither_reads_nor_moves_the_global_generator():
    one = fresh(1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = fresh(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    torch.set_rng_state(before)
    initialise(one, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_have_the_stated_widths_and_predict_nearly_uniformly():
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


def test_command_line_exports_a_checkpoint_whose_config_carries_the_scaling(checkpoint, tmp_path):
    folder = checkpoint("qwen2", False)
    done = export(folder, tmp_path / "out", "--yarn", 1.5, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_position_embeddings"] == 384
    expected = {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": WINDOW, "attention_factor": 1.0}
    assert expected.items() <= config["rope_scaling"].items() and expected.items() <= config["rope_parameters"].items()
    tokens = random_tokens(380)
    by_hand = load(folder)
    by_hand.set_rope(extend_window(by_hand.config, 1.5).rope)
    assert difference(our_logits(by_hand, tokens), their_logits(tmp_path / "out", tokens)) < 2e-5
    assert torch.equal(our_logits(by_hand, tokens), our_logits(load(tmp_path / "out"), tokens))
    plain = our_logits(load(folder), tokens)
    assert difference(our_logits(by_hand, tokens), plain) > 0.01


def test_command_line_errors_are_one_sentence_and_nothing_is_written(checkpoint, tmp_path):
    """One process for each would cost seconds, so main runs here; the process above proves that main is reached."""
    folder, scaled, out = checkpoint(), checkpoint("qwen3", True, "yarn"), tmp_path / "out"
    (tmp_path / "taken").mkdir()
    for arguments, said in [
        ((tmp_path / "nowhere", out), "no such model folder"),
        ((tmp_path / "taken", out), "no config.json"),
        ((folder, tmp_path / "taken"), "exists already"),
        ((folder, out, "--yarn", 1.0), "must be above 1"),
        ((folder, out, "--yarn", 0), "must be above 1"),
        ((scaled, out, "--yarn", 1.5), "already carries Yarn"),
    ]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
            model_file.main()
        message = stopped.value.code
        assert message.startswith("model.py: ") and said in message and "\n" not in message
        assert [file.name for file in tmp_path.iterdir()] == ["taken"] and not list((tmp_path / "taken").iterdir())


def test_extend_window_states_every_parameter(checkpoint):
    extended = extend_window(read_config(checkpoint()), 1.5, original_window=128, attention_factor=1.1)
    assert extended.rope.scaling == Yarn(1.5, 128, 1.1, 32.0, 1.0)
    assert extended.max_position_embeddings == 192


# ------------------------------------------------------------------------------------------- FSDP2, on one and two


@pytest.fixture
def mesh(tmp_path):
    """One gloo process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def check_sharded(folder: Path, out: Path, mesh) -> None:
    """What must hold on any number of processes; each of them calls it with the same batch."""
    batch = scored()
    whole = load(folder)
    with torch.no_grad():
        logits = our_logits(whole, batch[0][:30])
    expected = gradients(whole, whole(batch[0], Packed(batch[1]), *batch[2:]))

    model = load(folder)
    shard(model, mesh, torch.float32)
    names = dict(whole.named_parameters()).keys()
    assert dict(model.named_parameters()).keys() == names
    for _ in range(2):  # train, sample, train again
        ours = gradients(model, model(batch[0], Packed(batch[1]), *batch[2:]))
        for name in names:
            assert difference(ours[name].full_tensor(), expected[name]) < 1e-4 * max(1, expected[name].abs().max())
        with gathered(model):
            for _ in range(1 + 3 * mesh.get_rank()):  # no collective: the ranks may decode different numbers of steps
                assert difference(our_logits(model, batch[0][:30]), logits) < 1e-5
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()

    model(batch[0], Packed(batch[1]), *batch[2:]).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with gathered(model):
        after = our_logits(model, batch[0][:30])
    assert difference(after, logits) > 1e-3  # sampling sees the weights that were just trained
    save(model, out)
    dist.barrier()
    assert difference(our_logits(load(out), batch[0][:30]), after) < 1e-5

    with torch.device("meta"):
        empty = Transformer(read_config(out))
    shard(empty, mesh, torch.float32)
    empty.to_empty(device="cpu")
    model_file.load_weights(empty, out)
    with gathered(empty):
        assert difference(our_logits(empty, batch[0][:30]), after) < 1e-5


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen2", False)])
def test_sharded_model_in_one_process_is_the_same_model(checkpoint, tmp_path, mesh, family, tied):
    check_sharded(checkpoint(family, tied), tmp_path / "out", mesh)


def in_two_processes(rank: int, folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
    check_sharded(folder, tmp_path / "out", init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()


def test_sharded_model_in_two_processes_is_the_same_model(checkpoint, tmp_path):
    in_processes(in_two_processes, checkpoint(), tmp_path)


def test_recompute_and_sharding_together_give_the_same_gradients(checkpoint, mesh):
    batch = scored()
    whole = load(checkpoint())
    expected = gradients(whole, whole(batch[0], Packed(batch[1]), *batch[2:]))
    model = load(checkpoint())
    for layer in model.model.layers:
        layer.recompute = True
    shard(model, mesh, torch.float32)
    ours = gradients(model, model(batch[0], Packed(batch[1]), *batch[2:]))
    for name, gradient in expected.items():
        assert difference(ours[name].full_tensor(), gradient) < 1e-4 * max(1, gradient.abs().max())


def test_weights_are_sharded_again_when_sampling_fails(checkpoint, mesh):
    model = load(checkpoint())
    shard(model, mesh, torch.float32)
    with pytest.raises(KeyError), gathered(model):
        raise KeyError
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())


def test_sharding_in_bfloat16_does_not_round_the_temperature(checkpoint, mesh):
    # guards a silent mismatch: FSDP would cast float32 inputs, and 1.45 would be scored as 1.453
    tokens, lengths, predict, targets, _ = scored()
    plain = load(checkpoint(), dtype=torch.bfloat16)
    sharded = load(checkpoint())
    shard(sharded, mesh, torch.bfloat16)
    with torch.no_grad():
        wanted = plain(tokens, Packed(lengths), predict, targets, 1.45)
        rounded = plain(tokens, Packed(lengths), predict, targets, 1.453125)
    temperature = torch.full((len(targets),), 1.45)  # as training passes it; only tensors would be cast
    found = sharded(tokens, Packed(lengths), predict, targets, temperature).detach()
    assert (wanted - rounded).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
