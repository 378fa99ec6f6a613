"""What a model folder says of its training: nanopolaris.json for the programs here, and a card for people."""

from pathlib import Path

from huggingface_hub import ModelCardData

from engine.files import write_atomically
from engine.huggingface import SETTINGS, ModelError, check_keys, named, read_optional_json
from lab.metrics import read_metrics
from lab.problems import DATA_FILES, HUB_ID
from lab.recipe import Recipe, RlStage, load_recipe

CARD = """---
{front}
---

# {name}, stage {index}

Made from {model} by nanoPolaris, a PyTorch implementation of
[POLARIS](https://hkunlp.github.io/blog/2025/Polaris): reinforcement learning with verifiable rewards.

## Recipe

| stage | kind | data | steps | learning rate | temperature | tokens of a response |
|---|---|---|---|---|---|---|
{stages}

## Evaluation

{figures}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {place!r}  # or the hub id
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
chat = [{{"role": "user", "content": {question!r}}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"{switch})
print(tokenizer.decode(model.generate(**prompt)[0]))
```

`generation_config.json` samples as the evaluation did; `nanopolaris.json` has the settings of training as well.
"""


def write_cards(run: Path) -> None:
    """Write the README.md of every model of a run, stage-K, with the evaluations made so far."""
    recipe, rows = load_recipe(run / "recipe.toml"), read_metrics(run)
    for index in range(len(recipe.stage)):
        if (folder := run / f"stage-{index}").is_dir():
            write_atomically(folder / "README.md", [model_card(recipe, index, rows, folder).encode()])


def model_card(recipe: Recipe, index: int, rows: list[dict], folder: Path) -> str:
    """Return the model card after stage INDEX, whose front matter the hub reads; it names no licence."""
    names = dict.fromkeys(hub_id for stage in recipe.stage[: index + 1] if (hub_id := _hub_id(stage.data)))
    base, local = _hub_id(recipe.model), "a model of a folder" if recipe.world is None else "an untrained model"
    front = ModelCardData(
        base_model=base,
        datasets=list(names) or None,
        library_name="peft" if recipe.lora.rank else "transformers",
        pipeline_tag="text-generation",
        tags=["nanopolaris", "polaris", "grpo", "reinforcement-learning"],
    )
    stages, step = [], 0
    for number, stage in enumerate(recipe.stage[: index + 1]):
        own = [row for row in rows if row["stage"] == number and row["kind"] in ("sft", "rl")]
        step = max([step, *(row["step"] for row in own)])
        limits = ("", "")
        if isinstance(stage, RlStage):
            limits = f"{own[-1]['temperature']:g}" if own else "", f"{stage.max_response_tokens:,}"
        cells = (
            number,
            stage.kind,
            stage.data or "what the stage before kept",
            len(own),
            f"{stage.learning_rate:g}",
            *limits,
        )
        stages.append(f"| {' | '.join(map(str, cells))} |")
    figures = [
        f"- {row['name']}: avg@{row['n']} {100 * row['avg']:.1f} (95% {100 * row['low']:.1f} to "
        f"{100 * row['high']:.1f}) over {row['problems']:,} problems, temperature {row['temperature']:g}"
        for row in rows
        if row["kind"] == "eval" and row["step"] == step
    ]
    return CARD.format(
        front=front.to_yaml(),
        name=recipe.name,
        index=index,
        model=f"[{base}](https://huggingface.co/{base})" if base else local,
        stages="\n".join(stages),
        figures="\n".join(figures) or "None yet.",
        place=str(folder),
        question=" ".join(filter(None, ("4 + 8 - 6", recipe.instruction))),
        switch="" if recipe.thinking == "auto" else f", enable_thinking={recipe.thinking}",
    )


def _hub_id(source: str) -> str | None:
    """Return the hub id, without its split, that a source of a recipe is; None for a file or folder."""
    found = HUB_ID.fullmatch(source)
    is_local = source.startswith("world/") or source.endswith(DATA_FILES) or Path(source).exists()
    return None if is_local or not found else f"{found['owner']}/{found['name']}"


def remembered(folder: Path, use: str = "") -> dict:
    """Return the settings that a run left in its model's folder, with those of "evaluation" or "training"; {} if none.

    Raises ModelError for values that no run writes.
    """
    held = read_optional_json(folder / SETTINGS)
    with named(folder / SETTINGS):
        check_keys(held)
        own = held.get(use) or {}
        check_keys(own)
        if str(held.get("thinking", "auto")).lower() not in ("auto", "true", "false"):
            raise ModelError(f"thinking must be true, false or auto, not {str(held['thinking'])[:60]!r}")
    found = {name: held.get(name) for name in ("instruction", "thinking")}
    found |= {name: own.get(name) for name in ("n", "temperature", "top_k", "max_tokens")}
    return {name: value for name, value in found.items() if value is not None}


def settings_files(
    recipe: Recipe, index: int, temperature: float, stop_tokens: tuple[int, ...], base: Path
) -> dict[str, dict]:
    """Return nanopolaris.json and generation_config.json, which other engines read, of the model after stage INDEX.

    "evaluation" is how the run evaluates it, "training" how the rl stage samples that trains it, now or next.
    `temperature` is the newest that was trained at, `base` the folder that the run started from.
    """
    stage = next((stage for stage in recipe.stage[index:] if isinstance(stage, RlStage)), None)
    training, own = None, recipe.eval
    if stage is not None:
        if stage is not recipe.stage[index] and not isinstance(stage.temperature, str):
            temperature = float(stage.temperature)
        training = {"n": stage.group_size, "temperature": temperature, "top_k": 0}
        training["max_tokens"] = stage.max_response_tokens
    evaluation = {"n": own.samples, "temperature": own.temperature, "top_k": own.top_k}
    evaluation["max_tokens"] = own.max_response_tokens
    if not own.data and training:
        evaluation = training
    settings = {"instruction": recipe.instruction, "thinking": recipe.thinking}
    generation = {
        "do_sample": evaluation["temperature"] > 0,
        "temperature": evaluation["temperature"],
        "top_k": evaluation["top_k"],
        "top_p": 1.0,
        "max_new_tokens": evaluation["max_tokens"],
        "eos_token_id": list(stop_tokens),
    }
    tokens = read_optional_json(base / "generation_config.json").items()
    return {
        SETTINGS: settings | {"evaluation": evaluation, "training": training},
        "generation_config.json": {k: v for k, v in tokens if k.endswith("_token_id")} | generation,
    }
