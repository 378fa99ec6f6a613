"""What a model folder says of its training: nanopolaris.json for the programs here, and a card for people."""

from pathlib import Path

from engine.huggingface import SETTINGS, ModelError, check_keys, named, read_optional_json
from lab.recipe import Recipe, RlStage


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
