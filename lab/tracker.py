"""Send a run's metrics, recipe and some rollouts to TensorBoard, Weights & Biases or Trackio: run.tracker names one."""

import importlib
import secrets
import tomllib
from importlib.util import find_spec
from pathlib import Path

from engine.files import write_atomically
from lab.glossary import markdown_table
from lab.recipe import Recipe, RecipeError, to_toml

ROLLOUT_CHARACTERS = 4000  # of a text in a table: its end, where the answer is


def require_tracker(name: str) -> None:
    """Raise RecipeError if the package of a tracker is not installed."""
    if name and find_spec(name) is None:
        raise RecipeError(f'run.tracker = "{name}" needs a package: `pip install {name}`, or set it to ""')


def open_tracker(folder: Path, recipe: Recipe, first_step: int | None) -> "TensorBoard | Wandb | None":
    """Return what run.tracker names; `first_step` is where a resumed run continues, None in a new one."""
    name = recipe.run.tracker
    if name == "tensorboard":
        return TensorBoard(folder, recipe, first_step)
    return Wandb(name, folder, recipe) if name else None


class TensorBoard:
    """Event files in RUN/tensorboard, without the steps after a checkpoint that the run resumes from."""

    def __init__(self, folder: Path, recipe: Recipe, first_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.board.add_text("glossary", markdown_table(), 0)
        self.board.add_text("recipe", f"```\n{to_toml(recipe)}```", 0)

    def log(self, row: dict) -> None:
        """Send the numbers of a row of metrics."""
        for name, number in scalars(row).items():
            self.board.add_scalar(name, number, row["step"])

    def log_rollouts(self, rows: list[dict]) -> None:
        """Send a rollout of each group."""
        for number, row in enumerate(rollouts_to_send(rows)):
            texts = (f"**{name}**\n\n```\n{value}\n```" for name, value in row.items())
            self.board.add_text(f"rollouts/{number}", "\n\n".join(texts), row["step"])

    def close(self) -> None:
        """Write what is left."""
        self.board.close()


class Wandb:
    """A run of Weights & Biases, or of Trackio, whose functions are the same; its name is in RUN/tracker-id."""

    def __init__(self, name: str, folder: Path, recipe: Recipe):
        self.module, path = importlib.import_module(name), folder / "tracker-id"
        if not path.exists():
            write_atomically(path, [f"{folder.name}-{secrets.token_hex(4)}".encode()])
        run = path.read_text(encoding="utf-8")
        own = {"id": run, "dir": str(folder), "settings": {"console": "off"}} if name == "wandb" else {}
        try:
            config = tomllib.loads(to_toml(recipe))
            self.module.init(project="nanopolaris", name=run, config=config, resume="allow", **own)
        except Exception as error:  # no class of errors stands for a missing login, network or disk
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecipeError(
                f'run.tracker = "{name}" cannot start ({why}): log in, use it offline, or set ""'
            ) from error

    def log(self, row: dict) -> None:
        """Send the numbers of a row of metrics."""
        self.module.log(scalars(row), step=row["step"])

    def log_rollouts(self, rows: list[dict]) -> None:
        """Send a table with a rollout of each group."""
        if sent := rollouts_to_send(rows):
            table = self.module.Table(columns=list(sent[0]), data=[list(row.values()) for row in sent])
            self.module.log({"rollouts": table}, step=rows[0]["step"])

    def close(self) -> None:
        """Send what is left."""
        self.module.finish()


def scalars(row: dict) -> dict[str, float]:
    """Return the numbers of a row of metrics as kind/key or kind/key/part; an evaluation's kind is eval/NAME."""
    prefix, found = f"eval/{row.get('name')}" if row["kind"] == "eval" else row["kind"], {}
    for key, value in row.items():
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float) and key not in ("step", "stage", "final"):
                found[f"{prefix}/{key}/{part}".rstrip("/")] = number
    return found


def rollouts_to_send(groups: list[dict]) -> list[dict]:
    """Return the first response of each group as a row of a table, with the ends of long texts."""

    def shown(value: object) -> float | str:
        text = str(value)
        cut = f"... {text[-ROLLOUT_CHARACTERS:]}" if len(text) > ROLLOUT_CHARACTERS else text
        return value if isinstance(value, int | float) else cut

    keys = ("step", "kind", "problem_id", "prompt", "answers", "temperature", "fate")
    rows = [{key: group[key] for key in keys} | group["responses"][0] for group in groups]
    return [{key: shown(value) for key, value in row.items()} for row in rows]
