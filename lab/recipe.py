"""Every number of a run: typed dataclasses, read from TOML.

    load_recipe("recipes/tiny.toml", ["stage.1.temperature=1.2"])

An unknown key is an error that names the nearest known one; a value of the wrong type is an error too. What a
recipe leaves out has the default below, and what was resolved is written into the run's folder.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from lab.arithmetic import World
from lab.problems import INSTRUCTION

MOST_SHOWN = 200  # characters of what a recipe holds, in an error


class RecipeError(ValueError):
    """A recipe that cannot be run, in one sentence: what, where, what to do."""


@dataclass(frozen=True)
class SamplerSettings:
    """The KV cache of one process. A page as long as a whole sequence suits a CPU; a GPU wants 256."""

    rows: int = 64  # sequences decoded at once
    page_tokens: int = 256
    cache_tokens: int = 1_000_000  # of all sequences together


@dataclass(frozen=True)
class RewardSettings:
    """The reward is the weighted sum of its parts; POLARIS uses the right answer alone."""

    correct: float = 1.0
    format: float = 0.0
    steps: float = 0.0
    workers: int = 2  # processes for symbolic answers
    time_limit_seconds: float = 5.0
    most_failed_share: float = 0.02  # of answers on which the grader itself may fail before that stops the run


@dataclass(frozen=True)
class EvalSettings:
    """The held-out problems, looked at through the run."""

    data: str = ""  # empty: no held-out evaluation
    samples: int = 8  # responses per problem
    temperature: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 1024
    problems: int = 0  # the first so many; 0: all
    every_steps: int = 0  # within rl stages; 0: only between stages
    problems_within_stage: int = 0  # the first so many of these evaluations; 0: as many as between stages


@dataclass(frozen=True)
class FinalSettings:
    """The evaluation at the end: longer than trained, with and without YaRN."""

    data: str = ""  # empty: none
    samples: int = 8
    temperature: float = 1.4
    top_k: int = 20
    max_response_tokens: int = 90_000
    yarn_factor: float = 1.5
    yarn_original_window: int = 65_536  # a choice: POLARIS does not state it
    yarn_attention_factor: float = 1.0  # off, as the recipe has it


@dataclass(frozen=True)
class GuardSettings:
    """What is looked for in the training data before the first step; `exclude` leaves it out, counted and on record.

    Two texts are the same without letter case, white space, dollar signs and the instruction.
    """

    duplicates: str = "report"  # one text under several ids; "exclude" keeps the recipe's first
    contamination: str = "report"  # problems of eval.data, final.data and `benchmarks`; "exclude" trains on none
    benchmarks: tuple[str, ...] = ()  # more to compare with: aime24 and the like, files, folders of files, hub ids


@dataclass(frozen=True)
class SearchSettings:
    """The search upward for the temperature that restores the diversity score of the stage before."""

    step: float = 0.05
    most: float = 2.0  # where the search ends
    problems: int = 64  # at most
    samples: int = 8
    margin: float = 0.0  # half width of distinct-4's 95% interval that is enough; 0: all problems are asked


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter, trained instead of the weights (arXiv 2106.09685).

    It wants about 10 times the learning rate of full training ("LoRA Without Regret", Schulman et al. 2025): see each
    stage's `learning_rate`.
    """

    rank: int = 0  # of every projection of every layer; 0: no adapter, all weights are trained
    alpha: float = 32.0  # what the adapter adds is multiplied by alpha / rank


@dataclass(frozen=True)
class RunSettings:
    """What is kept of a run."""

    checkpoint_every_steps: int = 20
    checkpoints_kept: int = 2
    most_nonfinite_steps: int = 3  # updates in a row without a finite gradient, at which the run stops
    rollouts_written: int = 4  # whole rollouts per step, for people to read
    tensorboard: bool = False


@dataclass(frozen=True)
class SftStage:
    """Supervised fine-tuning on worked solutions: `problem` + `solution`, or `messages`."""

    kind: str = "sft"
    data: str = ""
    steps: int = 0
    batch_sequences: int = 64
    max_tokens: int = 1024  # of one sequence; a longer one is an error
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    decay_share: float = 0.0  # of the steps, at the end, over which the rate falls to a tenth
    adam_beta2: float = 0.95
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class VariantSettings:
    """What else the field does, one at a time or together; the defaults are POLARIS. Sources are in variants.py."""

    loss: str = "polaris"  # the ratio clipped by token; "gspo": by response; "cispo": as a weight
    gspo_clip_low: float = 3e-4
    gspo_clip_high: float = 4e-4
    cispo_cap: float = 5.0  # the largest ratio, 1 + epsilon
    divide_by_std: bool = True  # false: an advantage is reward - mean (Dr. GRPO)
    average: str = ""  # over "tokens" or "sequences", or by a "constant" (Dr. GRPO); empty: as the loss's paper has it
    drop_zero_variance: bool = False  # groups of equal rewards are left out; `substitute` must be false
    drop_truncated: bool = False  # overlong filtering: responses cut at the limit are not learned from
    punish_last_tokens: int = 0  # soft overlong punishment in the last so many tokens before the limit; 0: none
    importance_cap: float = 0.0  # truncated importance sampling: the largest weight of a token; 0: none
    optimizer_steps: int = 1  # per batch, each on its share of the problems


@dataclass(frozen=True)
class RlStage:
    """One stage of reinforcement learning. The defaults are the POLARIS recipe's."""

    kind: str = "rl"
    data: str = ""  # empty: what the stage before has left
    steps: int = 0
    generated_tokens: int = 0  # training rollouts' tokens after which the stage ends, before `steps`; 0: by steps alone
    batch_problems: int = 128
    group_size: int = 8
    temperature: float | str = 1.4  # a number, or "match": restore the diversity of the stage before
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 39_936
    filter_before: bool = False  # sample every problem and drop the always solved (RECIPE section 1)
    drop_at: float = 1.0  # by that filter
    drop_above: float = 0.9  # after the stage
    drop_window: str = "stage"  # by the visits of the stage just ended, or of "all" stages
    rescue: bool = True
    substitute: bool = True
    informative_share: float = 1 / 3  # fewer informative groups than this: no update
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    adam_beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    variant: VariantSettings = field(default_factory=VariantSettings)


@dataclass(frozen=True)
class Recipe:
    """A run."""

    name: str
    model: str  # a folder or a hub id; world/... is what `world` writes into the run's folder
    stage: tuple[SftStage | RlStage, ...]
    seed: int = 0
    max_position_embeddings: int = 0  # the model's window; 0: as its config says
    thinking: bool = True  # whether a response must close its thinking block
    instruction: str = INSTRUCTION  # appended to a problem that does not carry it
    micro_batch_tokens: int = 65_536  # of one forward and backward; a longer sequence goes alone
    recompute_activations: bool = True
    offload_activations: bool = False  # what recomputation starts from waits in host memory
    offload_optimizer: bool = False  # AdamW's moments live in host memory
    float32_head: bool = True  # logits of a bfloat16 model come out as float32, in sampler and trainer alike
    world: World | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    final: FinalSettings = field(default_factory=FinalSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    run: RunSettings = field(default_factory=RunSettings)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides of the form `stage.0.temperature=1.2`. Raises RecipeError."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path(__file__).parent.parent.glob("recipes/*.toml")))
        raise RecipeError(f"{path}: no such recipe file (there are {known})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # TOML's own, not UTF-8, and what Python refuses to read
        raise RecipeError(f"{path}: not valid TOML ({str(error).splitlines()[0][:MOST_SHOWN]})") from None
    for override in overrides:
        _apply(table, override)
    recipe = _build(Recipe, table, "")
    _check(recipe)
    return recipe


def _apply(table: dict, override: str) -> None:
    """Set one value in the parsed TOML; what it names is checked with everything else."""
    name, equals, text = override.partition("=")
    shown = _plain(override)
    if not equals:
        raise RecipeError(f"--set {shown}: write NAME=VALUE, such as stage.0.temperature=1.2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    *path, last = name.split(".")
    here: object = table
    for part in path:
        if isinstance(here, list):
            if part not in map(str, range(len(here))):
                raise RecipeError(f"--set {shown}: there is no number {_plain(part)}; the recipe has {len(here)}")
            here = here[int(part)]
        elif isinstance(here, dict):
            here = here.setdefault(part, {})
    if not isinstance(here, dict):
        raise RecipeError(f"--set {shown}: {_plain('.'.join(path))} is not a table")
    here[last] = value


def _plain(text: str) -> str:
    """A name or an override as it may stand in an error: one line, printable, not endless."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _shown(value: object) -> str:
    """A value as it may stand in an error."""
    try:
        return _plain(repr(value))
    except (ValueError, RecursionError):
        return "what Python cannot write out"


def _build(kind: type, table: object, where: str) -> typing.Any:
    """A dataclass from a TOML table; `where` is its dotted name, for errors."""
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: expected a table, not {_shown(table)}")
    known = {f.name: f for f in fields(kind)}
    types_of = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise RecipeError(f"unknown key {prefix}{_plain(key)}: {hint}")
    for f in fields(kind):
        if f.name not in table and f.default is f.default_factory:  # neither is given: both are MISSING
            raise RecipeError(f"the key {prefix}{f.name} is missing")
    return kind(**{key: _convert(value, types_of[key], prefix + key) for key, value in table.items()})


def _convert(value: object, kind: typing.Any, where: str) -> typing.Any:
    """A TOML value as the type that the field has."""
    _check_value(value, where)
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if kind == tuple[SftStage | RlStage, ...]:
        if not isinstance(value, list) or not value:
            raise RecipeError("a recipe needs at least one [[stage]]")
        return tuple(_build_stage(stage, f"stage.{i}") for i, stage in enumerate(value))
    if kind == tuple[int, int]:
        if isinstance(value, list | tuple) and len(value) == 2 and all(type(x) is int for x in value):
            return tuple(value)
        raise RecipeError(f"{where} must be two whole numbers, not {_shown(value)}")
    if kind == tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
            return tuple(value)
        raise RecipeError(f"{where} must be a list of texts, not {_shown(value)}")
    for option in options:
        if is_dataclass(option):
            return _build(option, value, where)
        if type(value) is option or (option is float and type(value) is int):
            return option(value)
    names = " or ".join(option.__name__ for option in options)
    raise RecipeError(f"{where} must be of type {names}, not {_shown(value)}")


def _check_value(value: object, where: str) -> None:
    """No number that is none or that 64 bits cannot hold, no text that cannot be written into a file or be a path."""
    for x in value if isinstance(value, list) else (value,):
        if isinstance(x, float) and not math.isfinite(x) or type(x) is int and not -(2**63) <= x < 2**63:
            raise RecipeError(f"{where} must be a finite number of at most 64 bits, not {_shown(x)}")
        if isinstance(x, str) and ("\0" in x or any("\ud800" <= c <= "\udfff" for c in x)):
            raise RecipeError(f"{where} holds a character that no file can: {_shown(x)}")


def _build_stage(table: object, where: str) -> SftStage | RlStage:
    kinds = {"sft": SftStage, "rl": RlStage}
    kind = table.get("kind") if isinstance(table, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise RecipeError(f"{where}.kind must be sft or rl, not {_shown(kind)}")
    return _build(kinds[kind], table, where)


LEAST = {  # the smallest value that makes sense, by field name, wherever it stands
    "seed": 0, "rows": 1, "page_tokens": 1, "cache_tokens": 1, "workers": 1, "samples": 1, "problems": 0,
    "steps": 1, "every_steps": 0, "problems_within_stage": 0, "max_response_tokens": 1, "max_prompt_tokens": 1,
    "checkpoint_every_steps": 1, "checkpoints_kept": 1, "rollouts_written": 0, "batch_sequences": 1,
    "batch_problems": 1, "group_size": 2, "max_tokens": 2, "micro_batch_tokens": 1, "learning_rate": 0.0,
    "rank": 0, "generated_tokens": 0, "most_nonfinite_steps": 1, "gspo_clip_low": 0.0, "gspo_clip_high": 0.0,
    "cispo_cap": 1.0,
    "punish_last_tokens": 0, "importance_cap": 0.0, "optimizer_steps": 1,
    "top_k": 0, "warmup_steps": 0, "max_position_embeddings": 0, "yarn_original_window": 1,
    "yarn_attention_factor": 0.0, "time_limit_seconds": 1e-3, "most_failed_share": 0.0, "yarn_factor": 1.0,
    "margin": 0.0, "step": 1e-3, "decay_share": 0.0, "adam_beta2": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e-12,
    "drop_at": 0.0, "drop_above": 0.0, "informative_share": 0.0, "clip_low": 0.0, "clip_high": 0.0, "dual_clip": 1.0,
    "sft_problems": 1, "train_problems": 1, "held_out_problems": 1, "beyond_problems": 1, "layers": 1, "window": 1,
    "hidden_size": 32, "filler_tokens": 1, "sft_noise": 0.0, "filler_share": 0.0,
}  # fmt: skip
MOST = {  # and the largest
    "most_failed_share": 1.0, "decay_share": 1.0, "adam_beta2": 1 - 1e-9, "informative_share": 1.0,
    "clip_low": 1.0, "sft_noise": 1.0, "filler_share": 1.0,
}  # fmt: skip


def _check_least(settings: typing.Any, where: str) -> None:
    """No number below the smallest that makes sense, in this table and those inside it."""
    for f in fields(settings):
        value, name = getattr(settings, f.name), f"{where}{f.name}"
        if is_dataclass(value):
            _check_least(value, f"{name}.")
        elif f.name in LEAST and type(value) is type(LEAST[f.name]) and value < LEAST[f.name]:
            raise RecipeError(f"{name} must be at least {LEAST[f.name]}, not {value}")
        elif type(value) is float and value > MOST.get(f.name, math.inf):
            raise RecipeError(f"{name} must be at most {MOST[f.name]:g}, not {value}")


def _check(recipe: Recipe) -> None:
    """What the types cannot say."""
    _check_least(recipe, "")
    if recipe.offload_activations and not recipe.recompute_activations:
        raise RecipeError(
            "offload_activations moves what recompute_activations keeps: set recompute_activations = true as well"
        )
    for key in ("duplicates", "contamination"):
        if (word := getattr(recipe.guard, key)) not in ("report", "exclude"):
            raise RecipeError(f'guard.{key} must be "report" or "exclude", not {word!r}')
    if not 0 < recipe.lora.alpha < math.inf:
        raise RecipeError(f"lora.alpha must be above 0, not {recipe.lora.alpha}")
    for key, settings in (("eval", recipe.eval), ("final", recipe.final)):
        if settings.temperature < 0:
            raise RecipeError(f"{key}.temperature must be at least 0, which is greedy, not {settings.temperature}")
    if recipe.name in ("", ".", "..") or "/" in recipe.name:
        raise RecipeError(f"name must be the name of a folder without a path, not {_shown(recipe.name)}")
    if recipe.world and recipe.world.hidden_size % 32:
        raise RecipeError(f"world.hidden_size must be a multiple of 32, not {recipe.world.hidden_size}")
    for key in ("sft_terms", "train_terms", "beyond_terms", "beyond_tokens") if recipe.world else ():
        low, high = getattr(recipe.world, key)
        if not 1 <= low <= high:
            raise RecipeError(f"world.{key} must be a range from 1 upward, such as [2, 6], not [{low}, {high}]")
    first_rl = True
    for i, stage in enumerate(recipe.stage):
        where = f"stage.{i}"
        _check_least(stage, f"{where}.")
        if isinstance(stage, SftStage):
            if not stage.data:
                raise RecipeError(f"{where}.data is missing: a file of worked solutions")
            continue
        if stage.drop_window not in ("stage", "all"):
            raise RecipeError(f'{where}.drop_window must be "stage" or "all", not {stage.drop_window!r}')
        _check_variant(stage, where)
        if isinstance(stage.temperature, str) and (stage.temperature != "match" or first_rl):
            what = "the first rl stage needs a number" if first_rl else "write a number or match"
            raise RecipeError(f"{where}.temperature is {stage.temperature!r}: {what}")
        if not isinstance(stage.temperature, str) and stage.temperature <= 0:
            raise RecipeError(f"{where}.temperature must be above 0: training samples the policy itself")
        if first_rl and not stage.data:
            raise RecipeError(f"{where}.data is missing: the first rl stage needs problems")
        if (
            recipe.max_position_embeddings
            and stage.max_prompt_tokens + stage.max_response_tokens > recipe.max_position_embeddings
        ):
            raise RecipeError(
                f"{where}: {stage.max_prompt_tokens} + {stage.max_response_tokens} tokens exceed "
                f"max_position_embeddings = {recipe.max_position_embeddings}"
            )
        first_rl = False


def _check_variant(stage: RlStage, where: str) -> None:
    """A known loss and average, and nothing that contradicts the stage."""
    variant = stage.variant
    for name, known in {"loss": ("polaris", "gspo", "cispo"), "average": ("tokens", "sequences", "constant")}.items():
        value = getattr(variant, name)
        if value not in (*known, getattr(VariantSettings, name)):
            nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise RecipeError(f"unknown {where}.variant.{name} {value!r}: {hint}")
    if variant.drop_zero_variance and stage.substitute:
        raise RecipeError(
            f"{where}.variant.drop_zero_variance leaves out the groups that {where}.substitute overwrites: "
            f"set {where}.substitute = false as well"
        )
    if 0 < variant.importance_cap < 1:
        raise RecipeError(
            f"{where}.variant.importance_cap must be 0 (none) or at least 1, the weight of a token on policy, "
            f"not {variant.importance_cap}"
        )
    if stage.batch_problems % variant.optimizer_steps:
        raise RecipeError(
            f"{where}.variant.optimizer_steps = {variant.optimizer_steps} does not divide the "
            f"{stage.batch_problems} problems of a batch into equal shares"
        )
    if variant.punish_last_tokens > stage.max_response_tokens:
        raise RecipeError(
            f"{where}.variant.punish_last_tokens = {variant.punish_last_tokens} exceeds "
            f"max_response_tokens = {stage.max_response_tokens}"
        )


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every value spelt out; reading it back gives the same recipe."""
    table = asdict(recipe)
    stages = table.pop("stage")
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"{key} = {_literal(value)}" for key, value in table.items() if value is not None and key not in tables]
    for name, values in [*tables.items(), *(("[stage]", stage) for stage in stages)]:
        lines += ["", f"[{name}]", *(f"{key} = {_literal(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_literal(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
