"""What a model folder says of its training: nanopolaris.json for the programs here, and a card for people."""

from pathlib import Path

from jinja2 import Template

from engine.files import write_atomically
from engine.huggingface import SETTINGS, ModelError, check_keys, named, read_optional_json
from lab.data_files import HUB_ID
from lab.metrics import read_metrics
from lab.recipe import Recipe, RlStage, load_recipe


def settings_files(
    recipe: Recipe, index: int, temperature: float, stop_tokens: tuple[int, ...], base: Path
) -> dict[str, dict]:
    """Return nanopolaris.json and generation_config.json, which other engines read, of the model after stage INDEX.

    "evaluation" is how the run evaluates it; "training" how the rl stage samples that trains it, now or next.
    `temperature` is the newest that was trained at, `base` the folder that the run started from.
    """

    def settings(n: int, temperature: float, top_k: int, max_tokens: int) -> dict:
        return {"n": n, "temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}

    held_out, training = recipe.eval, None
    stage = next((stage for stage in recipe.stage[index:] if isinstance(stage, RlStage)), None)
    evaluation = settings(held_out.samples, held_out.temperature, held_out.top_k, held_out.max_response_tokens)
    if stage is not None:
        if stage is not recipe.stage[index] and not isinstance(stage.temperature, str):
            temperature = float(stage.temperature)
        training = settings(stage.group_size, temperature, 0, stage.max_response_tokens)
        evaluation = evaluation if held_out.data else training
    shared = {"instruction": recipe.instruction, "thinking": recipe.thinking}
    tokens = read_optional_json(base / "generation_config.json").items()
    generation = {name: token for name, token in tokens if name.endswith("_token_id")}
    generation |= {"do_sample": evaluation["temperature"] > 0, "top_p": 1.0, "max_new_tokens": evaluation["max_tokens"]}
    generation |= {name: evaluation[name] for name in ("temperature", "top_k")} | {"eos_token_id": list(stop_tokens)}
    return {SETTINGS: shared | {"evaluation": evaluation, "training": training}, "generation_config.json": generation}


def remembered(folder: Path, use: str = "") -> dict:
    """Return the settings that a run left in its model's folder, with those of "evaluation" or "training"; {} if none.

    Raises ModelError for values that no run writes.
    """
    held = read_optional_json(folder / SETTINGS)
    with named(folder / SETTINGS):
        check_keys(held)
        check_keys(own := held.get(use) or {})
        if held.get("thinking", "auto") not in ("auto", True, False):
            raise ModelError(f"thinking must be true, false or auto, not {str(held['thinking'])[:60]!r}")
    known = {"instruction", "thinking"}, {"n", "temperature", "top_k", "max_tokens"}
    return {name: part[name] for part, names in zip((held, own), known, strict=True) for name in part.keys() & names}


def write_cards(run: Path) -> None:
    """Write the README.md of every model of a run, stage-K, with the evaluations made so far; it names no licence."""
    recipe, rows = load_recipe(run / "recipe.toml"), read_metrics(run)
    text = (Path(__file__).parent / "templates" / "card.md").read_text(encoding="utf-8")
    template = Template(text, trim_blocks=True, keep_trailing_newline=True)
    on_hub = HUB_ID.fullmatch(recipe.model) and not recipe.world and not Path(recipe.model).exists()
    question = " ".join(filter(None, ("4 + 8 - 6", recipe.instruction)))
    stages = []
    for index, stage in enumerate(recipe.stage):
        folder = run / f"stage-{index}"
        if not folder.is_dir():
            return
        steps = [row for row in rows if row["stage"] == index and row["kind"] in ("sft", "rl")]
        stages.append((stage, steps))
        last = {row["step"] for row in steps[-1:]}
        evaluations = [row for row in rows if row["kind"] == "eval" and row["step"] in last]
        card = template.render(
            recipe=recipe, index=index, folder=folder, base=recipe.model if on_hub else "", stages=stages,
            evaluations=evaluations, question=question,
        )  # fmt: skip
        write_atomically(folder / "README.md", [card.encode()])
