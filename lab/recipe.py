"""All settings of a run: typed dataclasses, read from TOML.

    load_recipe("recipes/tiny.toml", ["stage.1.temperature=1.2", "stage.*.max_grad_norm=0.5"])
    python -m lab.recipe                   # list every key with its default, meaning and bounds

An unknown key is an error that names the nearest known one, and so is a value of the wrong type or out of bounds. A key
that a recipe leaves out has the default below; the resolved recipe is written into the run's folder.
"""

import difflib
import json
import math
import operator
import os
import re
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from engine.errors import UserError
from lab.problems import INSTRUCTION, Columns

MAX_SHOWN = 200  # characters of a recipe's content in an error
BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "one_of": ("one of", lambda value, known: value in known),
    "named": ("FILE.py:NAME or one of", lambda value, known: value in known or ":" in value),
}
MATCHES = ("match-previous", "match-first")  # temperatures that restore the diversity of an rl stage's start


class RecipeError(UserError):
    """A recipe that cannot be run; the message says what, where and what to do."""


def key(default: typing.Any, help: str = "", **bounds: typing.Any) -> typing.Any:
    """Declare a field with its help and bounds: `least`, `above`, `most`, `below`; `one_of`, `named` (tuples)."""
    return field(default=default, metadata={"help": help, **bounds})


# --------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class World:
    """The sums of lab/arithmetic.py. `*_terms` are numbers of summands, through which a set of problems cycles."""

    seed: int = key(0, least=0)
    sft_problems: int = key(32_000, least=1)
    sft_terms: tuple[int, ...] = key((2, 3, 4, 5, 6), least=1)
    sft_noise: tuple[float, ...] = key(
        (0.003, 0.003, 0.0075, 0.075, 0.2), "share of wrong steps with 2, 3, ... terms, and more", least=0, most=1
    )
    train_problems: int = key(640, least=1)
    train_terms: tuple[int, ...] = key((3, 4, 5, 4, 3, 6, 4, 3, 7, 4, 3, 4, 5, 3, 4, 6, 3, 4, 7, 8), least=1)
    held_out_problems: int = key(240, least=1)
    held_out_terms: tuple[int, ...] = key((3, 4, 5, 6, 7), least=1)
    filler_share: float = key(0.25, "of problems start with filler, to train late positions", least=0, most=1)
    trained_tokens: int = key(128, "filler may move the end of a solved problem up to here", least=1)
    beyond_tokens: tuple[int, int] = key((104, 128), "filler tokens of the problems beyond the trained window")
    beyond_problems: int = key(128, least=1)
    beyond_terms: tuple[int, ...] = key((3, 4, 5, 6), least=1)
    hidden_size: int = key(128, "a multiple of 32", least=32)
    layers: int = key(4, least=1)
    window: int = key(512, "max_position_embeddings", least=1)


@dataclass(frozen=True)
class SamplerSettings:
    """The KV cache of one process."""

    rows: int = key(64, "sequences decoded at once", least=1)
    page_tokens: int = key(256, "per page; on a CPU best as long as a full sequence", least=1)
    cache_tokens: int = key(1_000_000, "of all sequences together; 0: what fits into the free memory", least=0)


@dataclass(frozen=True)
class RewardSettings:
    """The weights of the reward's parts, and the grader's limits; POLARIS rewards the right answer alone."""

    function: str = key("", "FILE.py:NAME, called as NAME(text, row) instead of comparing answers; empty: compare")
    correct: float = 1.0
    format: float = 0.0
    steps: float = 0.0
    workers: int = key(2, "processes for symbolic answers, or calls of the function", least=1)
    time_limit_seconds: float = key(5.0, "for one symbolic answer or one call", least=1e-3)
    most_failed_share: float = key(0.02, "of answers on which the grader may fail; more: stop", least=0, most=1)


@dataclass(frozen=True)
class Reading:
    """How `data` is read."""

    columns: Columns = field(default_factory=Columns)
    on_bad_row: str = key(
        "stop", "skip leaves out unusable rows and prompts too long to train on", one_of=("stop", "skip")
    )


@dataclass(frozen=True)
class EvalSettings(Reading):
    """The evaluation on held-out problems during the run."""

    data: str = key("", "empty: no held-out evaluation")
    samples: int = key(8, "responses per problem", least=1)
    temperature: float = key(1.0, "0: greedy", least=0)
    top_k: int = key(0, "0: all tokens", least=0)
    max_response_tokens: int = key(1024, least=1)
    problems: int = key(0, "only the first N; 0: all", least=0)
    every_steps: int = key(0, "within rl stages; 0: only between stages", least=0)
    problems_within_stage: int = key(0, "only the first N; 0: as between stages", least=0)


@dataclass(frozen=True)
class FinalSettings(Reading):
    """The evaluation at the end: longer than trained, with and without YaRN."""

    data: str = key("", "empty: none")
    samples: int = key(8, "responses per problem", least=1)
    temperature: float = key(1.4, "0: greedy", least=0)
    top_k: int = key(20, "0: all tokens", least=0)
    max_response_tokens: int = key(90_000, least=1)
    yarn_factor: float = key(1.5, least=1)
    yarn_original_window: int = key(65_536, "a choice: POLARIS does not state it", least=1)
    yarn_attention_factor: float = key(1.0, "1: off, as in POLARIS", least=0)
    yarn_beta_fast: float = key(32.0, "rotations over the original window above which a dimension stays", least=0)
    yarn_beta_slow: float = key(1.0, "rotations below which it is interpolated fully", least=0)


@dataclass(frozen=True)
class GuardSettings:
    """Checks of the training data before the first step; "exclude" leaves out what they find, and records it.

    Texts are compared without letter case, white space, dollar signs and the instruction.
    """

    duplicates: str = key("report", "one text under several ids; exclude keeps the first", one_of=("report", "exclude"))
    contamination: str = key("report", "problems of eval.data, final.data, benchmarks", one_of=("report", "exclude"))
    benchmarks: tuple[str, ...] = key((), "further benchmarks: names such as aime24, files, folders, hub ids")


@dataclass(frozen=True)
class SearchSettings:
    """The upward search for the temperature that restores an earlier stage's diversity."""

    step: float = key(0.05, least=1e-3)
    most: float = key(2.0, "highest temperature tried")
    problems: int = key(64, "at most", least=1)
    samples: int = key(8, "responses per problem", least=1)
    margin: float = key(0.0, "stop at this half width of distinct-4's 95% interval; 0: never", least=0)


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter, trained instead of the weights (arXiv 2106.09685).

    It needs about 10 times the learning rate of full training ("LoRA Without Regret", Schulman et al. 2025).
    """

    rank: int = key(0, "of every projection of every layer; 0: train all weights", least=0)
    alpha: float = key(32.0, "the adapter's output is scaled by alpha / rank", above=0)


@dataclass(frozen=True)
class RunSettings:
    """What a run writes, and when it gives up."""

    checkpoint_every_steps: int = key(20, least=1)
    checkpoints_kept: int = key(2, least=1)
    most_nonfinite_steps: int = key(3, "consecutive non-finite updates that stop the run", least=1)
    rollouts_written: int = key(4, "whole groups written per evaluation, and at ten steps of a stage, to read", least=0)
    tracker: str = key("", "also send metrics to it; empty: none", one_of=("", "tensorboard", "wandb", "trackio"))


@dataclass(frozen=True)
class SftStage(Reading):
    """Supervised fine-tuning on worked solutions: `problem` + `solution`, or `messages`."""

    kind: str = "sft"
    data: str = ""
    steps: int = key(0, least=1)
    batch_sequences: int = key(64, least=1)
    max_tokens: int = key(1024, "per sequence; a longer one is an error", least=2)
    learning_rate: float = key(1e-5, least=0)
    warmup_steps: int = key(0, least=0)
    decay_share: float = key(0.0, "of the steps, at the end, over which the rate falls to a tenth", least=0, most=1)
    adam_beta2: float = key(0.95, least=0, below=1)
    weight_decay: float = key(0.01, least=0)
    max_grad_norm: float = key(1.0, above=0)


@dataclass(frozen=True)
class VariantSettings:
    """Alternatives from other papers, alone or combined; the defaults are POLARIS. Sources are in lab/variants.py."""

    advantage: str = key(
        "polaris", "(reward - mean) by std, 1, mean; NAME(rewards)", named=("polaris", "centred", "maxrl")
    )
    loss: str = key(
        "polaris", "clips a token, response, weight; NAME(logprobs, batch)", named=("polaris", "gspo", "cispo")
    )
    filter: str = key("", "FILE.py:NAME, called as NAME(pass_rates) instead of drop_at and drop_above; empty: those")
    gspo_clip_low: float = key(3e-4, least=0)
    gspo_clip_high: float = key(4e-4, least=0)
    cispo_cap: float = key(5.0, "the largest ratio, 1 + epsilon", least=1)
    average: str = key("", "empty: as in the loss's paper", one_of=("", "tokens", "sequences", "constant"))
    drop_zero_variance: bool = key(False, "leave out groups of equal rewards; `substitute` must be false")
    drop_truncated: bool = key(False, "overlong filtering: no loss on responses cut at the limit")
    punish_last_tokens: int = key(0, "before the limit: soft overlong punishment; 0: none", least=0)
    importance_cap: float = key(0.0, "truncated importance sampling: largest token weight; 0: none", least=0)
    optimizer_steps: int = key(1, "per batch, each on its share of the problems", least=1)


@dataclass(frozen=True)
class RlStage(Reading):
    """One stage of reinforcement learning. The defaults are those of POLARIS."""

    kind: str = "rl"
    data: str = key("", "empty: the problems that the previous stage kept")
    steps: int = key(0, least=1)
    generated_tokens: int = key(0, "training rollout tokens after which the stage ends; 0: no limit", least=0)
    batch_problems: int = key(128, least=1)
    group_size: int = key(8, "rollouts per problem", least=2)
    temperature: float | str = key(1.4, "a number, or restore the diversity of a stage: match-previous, match-first")
    max_prompt_tokens: int = key(1024, least=1)
    max_response_tokens: int = key(39_936, least=1)
    filter_before: bool = key(False, "sample every problem, drop the always solved (RECIPE section 1)")
    drop_at: float = key(1.0, "that filter drops this pass rate and above", least=0)
    drop_above: float = key(0.9, "pass rates dropped after the stage", least=0)
    drop_window: str = key("stage", "count the visits of that stage, or of all", one_of=("stage", "all"))
    rescue: bool = True
    substitute: bool = True
    informative_share: float = key(1 / 3, "no update unless more groups are informative", least=0, most=1)
    clip_low: float = key(0.2, least=0, most=1)
    clip_high: float = key(0.28, least=0)
    dual_clip: float = key(3.0, least=1)
    learning_rate: float = key(1e-6, least=0)
    warmup_steps: int = key(0, least=0)
    adam_beta2: float = key(0.999, least=0, below=1)
    weight_decay: float = key(0.01, least=0)
    max_grad_norm: float = key(1.0, above=0)
    variant: VariantSettings = field(default_factory=VariantSettings)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    name: str
    model: str  # a folder or a hub id; `world` writes world/... into the run's folder
    stage: tuple[SftStage | RlStage, ...]
    seed: int = key(0, least=0)
    max_position_embeddings: int = key(0, "the model's window; 0: as in its config", least=0)
    thinking: bool | str = key(
        "auto",
        "whether only a box after </think> counts; given to the template, which decides auto",
        one_of=("auto", True, False),
    )
    instruction: str = key(INSTRUCTION, "appended to a problem that does not contain it")
    micro_batch_tokens: int = key(65_536, "per forward and backward; a longer sequence goes alone", least=1)
    recompute_activations: bool = True
    offload_activations: bool = key(False, "keep the layers' saved inputs in host memory")
    offload_optimizer: bool = key(False, "keep AdamW's moments in host memory")
    float32_head: bool = key(True, "float32 logits of a bfloat16 model, in sampler and trainer")
    world: World | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    final: FinalSettings = field(default_factory=FinalSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    run: RunSettings = field(default_factory=RunSettings)


def how_to_read(recipe: Recipe, source: str) -> tuple[str, bool, Columns]:
    """Return how `read_problems` reads a source: on_bad_row, rewarded, columns. All stages that name it share them."""
    users = [user for user in (*recipe.stage, recipe.eval, recipe.final) if user.data == source]
    user = users[0] if users else Reading()
    return user.on_bad_row, bool(recipe.reward.function), user.columns


def describe_keys(kind: type = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield a line for every key: its default, meaning and bounds."""
    tables = {"world": (World,), "stage": (SftStage, RlStage)}
    for f in fields(kind):
        inner = tables.get(f.name, (f.default_factory,))
        if is_dataclass(inner[0]):
            for table in inner:
                yield from describe_keys(table, f"{prefix}{f.name}.")
            continue
        bounds = [f"{words} {f.metadata[name]}" for name, (words, _) in BOUNDS.items() if name in f.metadata]
        default = "" if f.default is MISSING else f" = {f.default!r}"
        yield f"{prefix}{f.name}{default}".ljust(48) + ", ".join(filter(None, [f.metadata.get("help"), *bounds]))


# ------------------------------------------------------------------------------------------------------ reading


def load_recipe(path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, object] = {}) -> Recipe:
    """Read a recipe file and apply overrides of the form `stage.0.temperature=1.2`. Raises RecipeError.

    `defaults` are of keys of the recipe itself that it may leave out.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path(__file__).parent.parent.glob("recipes/*.toml")))
        raise RecipeError(f"{path}: no such recipe file; the shipped ones are {known}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # bad TOML or UTF-8, or a number that Python refuses
        raise RecipeError(f"{path}: not valid TOML ({str(error).splitlines()[0][:MAX_SHOWN]})") from None
    for override in overrides:
        _apply(table, override)
    table = {**defaults, **table}
    recipe = _build(Recipe, table, "")
    _check(recipe)
    return recipe


def _apply(table: dict, override: str) -> None:
    """Set one value in the parsed TOML; `_build` checks the name and the value."""
    name, equals, text = override.partition("=")
    shown = _plain(override)
    if not equals:
        raise RecipeError(f"--set {shown}: write NAME=VALUE, such as stage.0.temperature=1.2")
    value, *others = override_values(text)
    if others:
        what = f"{len(others) + 1} values are a sweep, which --plan and --resume RUN do not take"
        raise RecipeError(f"--set {shown}: {what}; write a text with a comma as '\"a,b\"'")
    stages = table.get("stage")
    kinds = [stage.get("kind") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    for each in named_keys(name, kinds):
        _put(table, each, value, shown)


def _put(table: dict, name: str, value: object, shown: str) -> None:
    """Set the value of one key; `shown` is its override, for errors."""
    *path, last = name.split(".")
    target: object = table
    for part in path:
        if isinstance(target, list):
            if part not in map(str, range(len(target))):
                raise RecipeError(f"--set {shown}: there is no number {_plain(part)}; the recipe has {len(target)}")
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
    if not isinstance(target, dict):
        raise RecipeError(f"--set {shown}: {_plain('.'.join(path))} is not a table")
    target[last] = value


def override_values(text: str) -> list:
    """Return the values that a --set gives its key: one, or those of a sweep, with commas between them.

    A TOML value, such as a list or a quoted text, is one value, and so is a bare text with a space after each comma.
    """
    with suppress(ValueError, RecursionError):
        return tomllib.loads(f"values = [{text}]")["values"] or [text]
    pieces = re.split(r",(?!\s)", text)  # bare words are texts
    return [value for piece in pieces for value in override_values(piece)] if len(pieces) > 1 else pieces


def named_keys(name: str, kinds: Sequence[str]) -> list[str]:
    """Return the keys that a --set names, in a recipe with stages of these kinds.

    `stage.*.KEY` is that of every stage that has the key; `stage.rl.KEY` and `stage.sft.KEY` are of one kind only.
    """
    named = re.fullmatch(r"stage\.(\*|sft|rl)\.(([^.]+).*)", name)
    if not named:
        return [name]
    wanted, rest, first = named.groups()
    keys = {stage.kind: [f.name for f in fields(stage)] for stage in (SftStage, RlStage)}
    found = [i for i, kind in enumerate(kinds) if wanted in ("*", kind) and first in keys.get(kind, ())]
    if not found:
        known = {key: 0 for kind in kinds if wanted in ("*", kind) for key in keys.get(kind, ())}
        raise RecipeError(f"--set {_plain(name)}: no such stage has the key {_plain(first)}: {_known(first, known)}")
    return [f"stage.{i}.{rest}" for i in found]


def _known(name: str, known: Collection[str]) -> str:
    """Suggest the nearest of the known keys, or all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"


def _plain(text: str) -> str:
    """Make text fit for an error: printable, one line, not too long."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _shown(value: object) -> str:
    """Write a value for an error."""
    try:
        return _plain(repr(value))
    except (ValueError, RecursionError):
        return "a value that is too long or too deep to print"


def _build(kind: type, table: object, where: str) -> typing.Any:
    """Make a dataclass from a TOML table; `where` is its dotted name, for errors."""
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: expected a table, not {_shown(table)}")
    known = {f.name: f for f in fields(kind)}
    types_of = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for name in table:
        if name not in known:
            raise RecipeError(f"unknown key {prefix}{_plain(name)}: {_known(name, known)}")
    for name, f in known.items():
        if name not in table and f.default is f.default_factory is MISSING:
            raise RecipeError(f"the key {prefix}{name} is missing")
    settings = kind(**{name: _convert(value, types_of[name], prefix + name) for name, value in table.items()})
    for f in known.values():  # defaults may be out of bounds too: a stage needs `steps`
        value = getattr(settings, f.name)
        for name, (words, holds) in BOUNDS.items():
            each = value if isinstance(value, tuple) else (value,)
            if name in f.metadata and not all(holds(x, f.metadata[name]) for x in each):
                raise RecipeError(f"{prefix}{f.name} must be {words} {f.metadata[name]}, not {_shown(value)}")
    return settings


def _convert(value: object, kind: typing.Any, where: str) -> typing.Any:
    """Convert a TOML value to the field's type."""
    _check_value(value, where)
    if kind == tuple[SftStage | RlStage, ...]:
        if not isinstance(value, list) or not value:
            raise RecipeError("a recipe needs at least one [[stage]]")
        return tuple(_build_stage(stage, f"stage.{i}") for i, stage in enumerate(value))
    if kind == tuple[int, int]:
        if not isinstance(value, list) or len(value) != 2 or any(type(x) is not int for x in value):
            raise RecipeError(f"{where} must be two whole numbers, not {_shown(value)}")
        if not 1 <= value[0] <= value[1]:
            raise RecipeError(f"{where} must be a range from 1 upward, such as [2, 6], not {value}")
        return tuple(value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise RecipeError(f"{where} must be a list of texts, not {_shown(value)}")
        return tuple(map(os.path.expanduser, value))  # benchmarks
    if kind in (tuple[int, ...], tuple[float, ...]):
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{where} must be a list of numbers, not {_shown(value)}")
        return tuple(_convert(x, typing.get_args(kind)[0], where) for x in value)
    if type(value) is str and where.rpartition(".")[2] in ("model", "data"):
        value = os.path.expanduser(value)
    options = typing.get_args(kind) or (kind,)  # of a union
    for option in options:
        if is_dataclass(option):
            return _build(option, value, where)
        if type(value) is option or (option is float and type(value) is int):
            return option(value)
    names = " or ".join(option.__name__ for option in options)
    raise RecipeError(f"{where} must be of type {names}, not {_shown(value)}")


def _check_value(value: object, where: str) -> None:
    """Refuse nan, infinity, numbers beyond 64 bits, and text that a file or a path cannot hold."""
    for x in value if isinstance(value, list) else (value,):
        if isinstance(x, float) and not math.isfinite(x) or type(x) is int and not -(2**63) <= x < 2**63:
            raise RecipeError(f"{where} must be a finite number of at most 64 bits, not {_shown(x)}")
        if isinstance(x, str) and ("\0" in x or any("\ud800" <= c <= "\udfff" for c in x)):
            raise RecipeError(f"{where} holds a character that no file can: {_shown(x)}")


def _build_stage(table: object, where: str) -> SftStage | RlStage:
    kind = table.get("kind") if isinstance(table, dict) else None
    if kind not in ("sft", "rl"):
        raise RecipeError(f"{where}.kind must be sft or rl, not {_shown(kind)}")
    if table.get("temperature") == "match":  # written out, so that a run's recipe says which one it restores
        table = table | {"temperature": "match-previous"}
    return _build(SftStage if kind == "sft" else RlStage, table, where)


def _check(recipe: Recipe) -> None:
    """Check rules that involve several keys or a name."""
    if recipe.offload_activations and not recipe.recompute_activations:
        raise RecipeError("offload_activations moves what recompute_activations keeps: set recompute_activations too")
    if recipe.name in ("", ".", "..") or "/" in recipe.name:
        raise RecipeError(f"name must be the name of a folder without a path, not {_shown(recipe.name)}")
    if recipe.world and recipe.world.hidden_size % 32:
        raise RecipeError(f"world.hidden_size must be a multiple of 32, not {recipe.world.hidden_size}")
    users = [(f"stage.{i}", stage) for i, stage in enumerate(recipe.stage)]
    for where, user in (*users, ("eval", recipe.eval), ("final", recipe.final)):
        if user.data and (user.on_bad_row, user.columns) != how_to_read(recipe, user.data)[::2]:
            raise RecipeError(f"{where}: columns and on_bad_row must be the same wherever {user.data!r} is read")
    first_rl = next((i for i, stage in enumerate(recipe.stage) if isinstance(stage, RlStage)), None)
    for i, stage in enumerate(recipe.stage):
        where = f"stage.{i}"
        if isinstance(stage, SftStage):
            if not stage.data:
                raise RecipeError(f"{where}.data is missing: a file of worked solutions")
            continue
        _check_variant(stage, where)
        if isinstance(stage.temperature, str) and (i == first_rl or stage.temperature not in MATCHES):
            what = "the first rl stage needs a number" if i == first_rl else f"write a number or {' or '.join(MATCHES)}"
            raise RecipeError(f"{where}.temperature is {stage.temperature!r}: {what}")
        if not isinstance(stage.temperature, str) and stage.temperature <= 0:
            raise RecipeError(f"{where}.temperature must be above 0: training samples the policy itself")
        if i == first_rl and not stage.data:
            raise RecipeError(f"{where}.data is missing: the first rl stage needs problems")
        prompt, response, window = stage.max_prompt_tokens, stage.max_response_tokens, recipe.max_position_embeddings
        if 0 < window < prompt + response:
            raise RecipeError(f"{where}: {prompt} + {response} tokens exceed max_position_embeddings = {window}")


def _check_variant(stage: RlStage, where: str) -> None:
    """Refuse a variant that contradicts its stage."""
    variant, name = stage.variant, f"{where}.variant"
    if variant.drop_zero_variance and stage.substitute:
        raise RecipeError(
            f"{name}.drop_zero_variance leaves out the groups that {where}.substitute overwrites: "
            f"set {where}.substitute = false as well"
        )
    if variant.advantage == "maxrl" and variant.punish_last_tokens:
        raise RecipeError(f"{name}.punish_last_tokens makes rewards negative; maxrl divides by their mean")
    if 0 < variant.importance_cap < 1:
        raise RecipeError(f"{name}.importance_cap must be 0 (none) or at least 1, not {variant.importance_cap}")
    steps, problems = variant.optimizer_steps, stage.batch_problems
    if problems % steps:
        raise RecipeError(f"{name}.optimizer_steps = {steps} does not divide the {problems} problems of a batch")
    last, limit = variant.punish_last_tokens, stage.max_response_tokens
    if last > limit:
        raise RecipeError(f"{name}.punish_last_tokens = {last} exceeds max_response_tokens = {limit}")


# ------------------------------------------------------------------------------------------------------ writing


def to_toml(recipe: Recipe) -> str:
    """Write the resolved recipe as TOML with every value; reading it back gives the same recipe."""
    table = asdict(recipe)
    stages = table.pop("stage")
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"{key} = {literal(value)}" for key, value in table.items() if value is not None and key not in tables]
    for name, values in [*tables.items(), *(("[stage]", stage) for stage in stages)]:
        lines += ["", f"[{name}]", *(f"{key} = {literal(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def literal(value: object) -> str:
    """Write a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {literal(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value)


if __name__ == "__main__":
    print(*describe_keys(), sep="\n")
