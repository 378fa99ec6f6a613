"""LoRA equals peft in logits and gradients; the base is never changed; sharding, resuming and merging work."""

import json
import os
import shutil
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import VOCABULARY
from forked import free_port, in_processes
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from engine import checkpoint as checkpoints
from engine import distributed, sharding
from engine.adapter import LORA_TARGETS, Lora, add_lora, initialise_lora, merge_lora
from engine.batches import TrainingSequence
from engine.sharding import gathered, shard
from engine.start import load_checkpoint
from grpo import optimizer_step, supervised_loss
from lab.export import export_arguments, main
from lab.recipe import LoraSettings, Recipe, RecipeError, load_recipe, to_toml
from model import Linear, Packed, Transformer, load, load_weights, read_config, save

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = [("qwen3", True), ("qwen2", False), ("llama", True)]
BARE_RECIPE = """name = "run"
model = "{}"
lora = {{ rank = 4, alpha = 12.0 }}
[[stage]]
kind = "sft"
data = "none.jsonl"
steps = 1
batch_sequences = 1
max_tokens = 64
"""
LENGTHS = [9, 1, 23, 14]


def tokens_of(lengths=LENGTHS) -> torch.Tensor:
    return torch.randint(VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(0))


def our_logits(model, lengths=LENGTHS) -> torch.Tensor:
    """Compute logits (T, V) of packed sequences."""
    return model.logits(model.hidden(tokens_of(lengths), Packed(lengths)))


def their_logits(model, lengths=LENGTHS) -> torch.Tensor:
    """Compute the same logits with a model of transformers or peft, one sequence at a time."""
    return torch.cat([model(part[None]).logits[0] for part in tokens_of(lengths).split(lengths)])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def peft_model(base: Path, targets=LORA_TARGETS, rank: int = 4, alpha: int = 12, **options):
    """Build peft's adapter on transformers' model, with A and B large enough to change the logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def peft_loads(base: Path, adapter: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def adapted(base: Path, rank: int = 4, alpha: float = 12.0, fresh: bool = False) -> Transformer:
    """Load our model with an adapter; unless fresh, one that changes the logits."""
    model = load(base)
    add_lora(model, Lora(rank, alpha, str(base)))
    initialise_lora(model, seed=5)
    return model if fresh else randomise_b(model)


def randomise_b(model: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            sharding.fill(parameter, 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def weighted_logprobs(logits: torch.Tensor) -> torch.Tensor:
    return (logits.log_softmax(1)[:, :5] * torch.linspace(-1, 2, 5)).sum()


def trained_gradients(model) -> dict[str, torch.Tensor]:
    """Return the adapter's full gradients, sharded or not, through the forward of training."""
    tokens = tokens_of()
    targets = tokens.roll(-1)
    logprobs = model(tokens, Packed(LENGTHS), torch.arange(len(tokens)), targets)
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    found = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad()
    return found


# ------------------------------------------------------------------------------------------ the same numbers as peft


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_logits_and_gradients_equal_peft(checkpoint, tmp_path, family, tied):
    theirs = peft_model(checkpoint(family, tied))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load(tmp_path / "adapter")
    assert relative(our_logits(ours), their_logits(theirs)) < 1e-5
    assert relative(our_logits(load(checkpoint(family, tied))), their_logits(theirs)) > 0.05  # the adapter changes them

    weighted_logprobs(our_logits(ours)).backward()
    weighted_logprobs(their_logits(theirs)).backward()
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 2
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and relative(found[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_a_fresh_adapter_does_not_change_the_logits(checkpoint, family, tied):
    plain, fresh = load(checkpoint(family, tied)), adapted(checkpoint(family, tied), fresh=True)
    with torch.no_grad():
        assert torch.equal(our_logits(fresh), our_logits(plain))
    assert trained_gradients(fresh)["model.layers.0.mlp.up_proj.lora_B"].abs().max() > 0  # but it can learn


def test_a_fresh_adapter_has_the_distribution_of_pefts(checkpoint):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=64, target_modules=list(LORA_TARGETS))
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint()), config).state_dict()
    model = adapted(checkpoint(), rank=64, fresh=True)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            expected = theirs[f"base_model.model.{name}.lora_A.default.weight"]
            assert module.lora_A.shape == expected.shape and module.lora_A.dtype == torch.float32
            assert module.lora_A.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.02)
            assert module.lora_A.std().item() == pytest.approx(expected.std().item(), rel=0.05)
            assert not module.lora_B.any()
    layers = [module.lora_A for name, module in model.named_modules() if name.endswith("up_proj")]
    assert not torch.equal(*layers)  # drawn one after the other, not all alike


def test_a_fresh_adapter_depends_on_its_seed_alone(checkpoint):
    draws = {}
    for name, seed in {"one": 1, "again": 1, "other": 2}.items():
        model = adapted(checkpoint())
        torch.manual_seed(len(draws))
        initialise_lora(model, seed)
        draws[name] = model.model.layers[0].mlp.up_proj.lora_A
    assert torch.equal(draws["one"], draws["again"]) and not torch.equal(draws["one"], draws["other"])


def test_a_bfloat16_base_is_never_merged_and_its_adapter_computes_in_bfloat16(checkpoint, tmp_path):
    save(adapted(checkpoint()), tmp_path / "adapter")
    model = load(tmp_path / "adapter", dtype=torch.bfloat16)
    expected = load(checkpoint(), dtype=torch.bfloat16)
    linear, plain = model.model.layers[0].mlp.up_proj, expected.model.layers[0].mlp.up_proj
    assert torch.equal(linear.weight, plain.weight) and linear.lora_A.dtype == torch.bfloat16
    x = torch.randn(5, 48).bfloat16()
    exact = x.double() @ (plain.weight.double() + 3.0 * linear.lora_B.double() @ linear.lora_A.double()).T
    assert relative(linear(x).double(), exact) < 0.01


# ---------------------------------------------------------------------------------------------- what is trained


@pytest.fixture
def processes():
    yield distributed.start()
    distributed.stop()


def from_meta(base: Path, mesh, compute_dtype=torch.float32, rank: int = 4) -> Transformer:
    """Build a model as start.build_model does."""
    with torch.device("meta"):
        model = Transformer(read_config(base))
    add_lora(model, Lora(rank, 12.0, str(base)))
    shard(model, mesh, compute_dtype)
    load_weights(model, base, "cpu")
    initialise_lora(model, seed=5)
    return model


def optimizer_of(model: Transformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def sequences() -> list[TrainingSequence]:
    return [TrainingSequence(part.numpy().astype(np.int32), 1) for part in tokens_of([9, 14, 23]).split([9, 14, 23])]


def plain_gradients(model: Transformer, batch: list[TrainingSequence]) -> dict[str, torch.Tensor]:
    """Compute the gradients of cross-entropy with plain autograd, one sequence at a time."""
    total = sum(len(sequence.tokens) - 1 for sequence in batch)
    for sequence in batch:
        tokens = torch.from_numpy(sequence.tokens).long()
        logits = model.logits(model.hidden(tokens, Packed([len(tokens)])))
        (torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum") / total).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def full_values(model: Transformer) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_a_step_changes_only_the_adapter(checkpoint, processes, family, tied):
    model = from_meta(checkpoint(family, tied), processes.mesh)
    before, losses = full_values(model), []
    optimizer = optimizer_of(model)
    for _ in range(5):
        update = optimizer_step(model, optimizer, sequences(), supervised_loss, max_tokens=25)
        assert update.stepped and update.grad_norm > 0
        losses.append(update.loss)
    assert losses[-1] < losses[0] - 0.01
    after = full_values(model)
    for name, value in load_file(checkpoint(family, tied) / "model.safetensors").items():
        assert torch.equal(after[name], value), name
    for name in after:
        assert torch.equal(after[name], before[name]) == (".lora_" not in name), name


def test_the_base_gets_no_gradient(checkpoint):
    found = trained_gradients(adapted(checkpoint()))
    assert len(found) == 28 and all(name.endswith(("lora_A", "lora_B")) for name in found)


def test_recompute_gives_the_same_gradients(checkpoint, processes):
    plain, recomputed = (randomise_b(from_meta(checkpoint(), processes.mesh)) for _ in range(2))
    for layer in recomputed.model.layers:
        layer.recompute = True
    expected, found = trained_gradients(plain), trained_gradients(recomputed)
    assert len(expected) == 28 and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_frozen_base_is_kept_once_in_the_compute_dtype(checkpoint, processes):
    model = randomise_b(from_meta(checkpoint(), processes.mesh, torch.bfloat16))
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name
        assert isinstance(parameter, DTensor) == is_adapter
        assert parameter.dtype == (torch.float32 if is_adapter else torch.bfloat16)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters() if ".lora_" not in name}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with gathered(model):
        inside = dict(model.named_parameters())
        assert {name: inside[name].data_ptr() for name in addresses} == addresses
        assert {p.dtype for p in inside.values()} == {torch.bfloat16}
        assert not any(isinstance(p, DTensor) for p in inside.values())
        assert model.model.layers[0].mlp.up_proj.lora_scale == 3.0
    assert {gradient.dtype for gradient in trained_gradients(model).values()} == {torch.float32}


def check_sharded(base: Path, out: Path, processes: distributed.Processes) -> None:
    """Compare a sharded model with an unsharded one, on any number of processes."""
    unsharded = adapted(base)
    with torch.no_grad():
        logits = our_logits(unsharded)
    expected = trained_gradients(unsharded)
    model = randomise_b(from_meta(base, processes.mesh))
    found = trained_gradients(model)
    assert found.keys() == expected.keys()
    assert all(relative(found[name], expected[name]) < 1e-5 for name in expected)
    with gathered(model):
        for _ in range(1 + processes.rank):  # no collective
            assert relative(our_logits(model), logits) < 1e-6

    optimizer, alone = optimizer_of(model), optimizer_of(unsharded)
    for _ in range(2):
        update = optimizer_step(model, optimizer, sequences(), supervised_loss, max_tokens=25)
        norm = torch.nn.utils.get_total_norm(plain_gradients(unsharded, sequences()).values())
        torch.nn.utils.clip_grad_norm_(unsharded.parameters(), 1.0)
        alone.step()
        alone.zero_grad()
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    found, wanted = full_values(model), full_values(unsharded)
    assert all(relative(found[name], wanted[name]) < 1e-4 for name in expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted.keys() - expected.keys())
    save(model, out)
    state = checkpoints.RunState(step=1)
    folder = checkpoints.save_checkpoint(out.parent / "run", model, optimizer, state, processes, 1)
    (out.parent / "run" / "recipe.toml").write_text(BARE_RECIPE.format(base))
    exported, tokenizer_from = load_checkpoint(folder)
    assert tokenizer_from == base
    for copy in (load(out), exported):
        assert all(torch.equal(value, found[name]) for name, value in full_values(copy).items())

    other = randomise_b(from_meta(base, processes.mesh))
    other_optimizer = optimizer_of(other)
    checkpoints.load_weights_and_optimizer(folder, other, other_optimizer, processes)
    for trained, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        optimizer_step(trained, its_optimizer, sequences(), supervised_loss, max_tokens=25)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        a, b = (x.to_local() if isinstance(x, DTensor) else x for x in (a, b))
        assert torch.equal(a, b)


def test_sharded_in_one_process(checkpoint, tmp_path, processes):
    check_sharded(checkpoint(), tmp_path / "out", processes)


def in_two_processes(rank: int, base: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": (tmp_path / "port").read_text()}
    check_sharded(base, tmp_path / "out", distributed.start())
    distributed.stop()


def test_two_processes_equal_one(checkpoint, tmp_path):
    (tmp_path / "port").write_text(str(free_port()))
    in_processes(in_two_processes, checkpoint("qwen2", False), tmp_path)


# ------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_the_adapter_alone(checkpoint, tmp_path, processes):
    model = from_meta(checkpoint(), processes.mesh)
    optimizer = optimizer_of(model)
    optimizer_step(model, optimizer, sequences(), supervised_loss, max_tokens=25)
    folder = checkpoints.save_checkpoint(tmp_path, model, optimizer, checkpoints.RunState(step=1), processes, 1)
    names = set(checkpoints.dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert weights == {name for name, p in model.named_parameters() if p.requires_grad}
    moments = {name for name in names if name.startswith("optimizer.state.")}  # per parameter two and a step count
    assert len(moments) == 3 * 28 and all(".lora_" in name for name in moments)


def test_a_checkpoint_with_another_lora_rank_is_refused(checkpoint, tmp_path, processes):
    def parts(rank):
        if rank:
            model = from_meta(checkpoint(), processes.mesh, rank=rank)
        else:
            model = load(checkpoint())
            shard(model, processes.mesh, torch.float32)
        return model, optimizer_of(model)

    for saved, wanted in ((4, 8), (4, 0), (0, 4)):
        folder = checkpoints.save_checkpoint(tmp_path, *parts(saved), checkpoints.RunState(step=1), processes, 1)
        with pytest.raises(checkpoints.CheckpointError) as caught:
            checkpoints.load_weights_and_optimizer(folder, *parts(wanted), processes)
        assert f"was saved with lora.rank = {saved}, not {wanted}" in str(caught.value)
        assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_command_line_merges_an_adapter(checkpoint, tmp_path, family, tied):
    from transformers import AutoModelForCausalLM

    theirs = peft_model(checkpoint(family, tied))
    theirs.save_pretrained(tmp_path / "adapter")
    main(export_arguments([str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype=float32"]))
    assert not list((tmp_path / "out").glob("adapter*"))
    with torch.no_grad():
        merged = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
        assert relative(merged, their_logits(theirs)) < 1e-5
    weights = theirs.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert relative(tensor, weights[name]) < 1e-6, name


def test_merging_rounds_once(checkpoint, tmp_path):
    """With a bfloat16 base too, the written weight is the nearest bfloat16 of the float32 W + scale B A."""
    base = tmp_path / "base"
    save(load(checkpoint()), base, torch.bfloat16)
    save(adapted(base), tmp_path / "adapter")
    main(export_arguments([str(tmp_path / "adapter"), str(tmp_path / "out")]))
    name, adapter = "model.layers.1.mlp.down_proj", load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = load_file(base / "model.safetensors")[f"{name}.weight"].float() + 3.0 * (b @ a)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"], expected.bfloat16())


def test_a_merged_model_has_no_adapter(checkpoint):
    model = adapted(checkpoint())
    with torch.no_grad():
        before = our_logits(model)
        merge_lora(model)
        assert relative(our_logits(model), before) < 1e-5
    assert model.lora is None and all(parameter.requires_grad for parameter in model.parameters())
    assert dict(model.named_parameters()).keys() == dict(load(checkpoint()).named_parameters()).keys()


# ----------------------------------------------------------------------------------------------- through train.py

RECIPE = """
name = "lora"
model = "{world}/model"
instruction = ""
micro_batch_tokens = 300
sampler = {{ rows = 16, page_tokens = 16, cache_tokens = 2000 }}
eval = {{ data = "{world}/held-out.jsonl", samples = 1, max_response_tokens = 16 }}
run = {{ checkpoint_every_steps = 2, checkpoints_kept = 20 }}
lora = {{ rank = 4, alpha = 8 }}
reward = {{ correct = 1.0, format = 0.1, steps = 0.5 }}
[[stage]]
kind = "sft"
data = "{world}/sft.jsonl"
steps = 30
batch_sequences = 5
learning_rate = 2e-2
decay_share = 0.5
[[stage]]
kind = "rl"
data = "{world}/train.jsonl"
steps = 3
batch_problems = 4
temperature = 1.0
max_prompt_tokens = 64
max_response_tokens = 24
informative_share = 0.0
learning_rate = 3e-3
drop_above = 1.0
"""
DETERMINISTIC = ("kind", "step", "loss", "grad_norm", "reward_mean", "response_length_mean", "distinct4", "avg")


def test_recipe_checks_the_adapter(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(world="world"))
    assert load_recipe(path).lora == LoraSettings(rank=4, alpha=8.0)
    assert Recipe("x", "y", ()).lora.rank == 0
    path.write_text(to_toml(load_recipe(path)))
    assert load_recipe(path).lora == LoraSettings(rank=4, alpha=8.0)
    for wrong, sentence in [
        ("lora.rank=-1", "lora.rank must be at least 0"),
        ("lora.rank=1.5", "lora.rank must be of type int"),
        ("lora.alpha=0", "lora.alpha must be above 0"),
        ("lora.alpha=nan", "lora.alpha must be a finite number"),
        ("lora.rang=4", "did you mean rank?"),
    ]:
        with pytest.raises(RecipeError, match=sentence.replace("?", r"\?")):
            load_recipe(path, [wrong])


def start(*arguments) -> forked.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return forked.run(command, capture_output=True, timeout=200)


def deterministic_metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in DETERMINISTIC if key in row} for row in rows]


@pytest.fixture(scope="module")
def world(small_world, tmp_path_factory) -> Path:
    """Copy the small world, with a base and SFT solutions that an adapter can quickly learn."""
    folder = tmp_path_factory.mktemp("lora") / "world"
    shutil.copytree(small_world, folder)
    weights = load_file(folder / "model" / "model.safetensors")
    # freshly initialised embeddings make all tokens equally likely, and an adapter cannot change them
    weights["model.embed_tokens.weight"] *= 30
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    # it earns the format reward; after so few steps it is written sometimes, so that advantages are not zero
    problems = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [problem | {"solution": "</think> \\boxed{1}"} for problem in problems]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(world) -> Path:
    (world.parent / "recipe.toml").write_text(RECIPE.format(world=world))
    done = start(ROOT / "train.py", world.parent / "recipe.toml", "--out", world.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of them trained)" in done.stdout
    return world.parent / "lora"


def test_a_run_trains_one_adapter_through_its_stages(finished, world):
    steps = [row for row in deterministic_metrics(finished) if row["kind"] in ("sft", "rl")]
    assert [row["step"] for row in steps] == list(range(1, 34))
    assert all(row["grad_norm"] > 0 for row in steps[:30]) and all(row["grad_norm"] > 0 for row in steps[30:])
    first, last = (load_file(finished / f"stage-{k}" / "adapter_model.safetensors") for k in (0, 1))
    assert first.keys() == last.keys() and all(0 < relative(last[name], first[name]) < 0.9 for name in first)
    assert load(finished / "stage-1").lora == Lora(4, 8.0, str(world / "model"))


def test_the_adapter_of_a_run_has_the_same_logits_in_peft(finished, world):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(finished / "stage-1")(" 3 + 4 - 2</think>", return_tensors="pt").input_ids
    assert ids.shape[1] > 5
    model = load(finished / "stage-1")
    with torch.no_grad():
        ours = model.logits(model.hidden(ids[0], Packed([ids.shape[1]])))
        assert relative(peft_loads(world / "model", finished / "stage-1")(ids).logits[0], ours) < 1e-5


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "stage-1")
    shutil.rmtree(folder / "checkpoints" / "step-33")
    done = start(ROOT / "train.py", "--resume", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after step 32" in done.stdout
    assert deterministic_metrics(folder) == deterministic_metrics(finished)
    resumed, straight = (load_file(f / "stage-1" / "adapter_model.safetensors") for f in (folder, finished))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_resuming_with_another_lora_rank_is_refused(finished, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step-33")
    done = start(ROOT / "train.py", "--resume", folder, "--set", "lora.rank=8")
    assert done.returncode == 1 and "was saved with lora.rank = 4, not 8" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_eval_loads_an_adapter(finished, world, tmp_path):
    arguments = ["--data", world / "held-out.jsonl", "-n", "1", "--max-tokens", "8", "--out", tmp_path / "out"]
    done = start(ROOT / "eval.py", finished / "stage-1", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "results.json").exists()
