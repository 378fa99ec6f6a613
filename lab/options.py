"""The command lines of train.py, eval.py and data_filter.py, parsed without torch and checked before any loading."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from os.path import expanduser
from pathlib import Path

from engine.errors import UserError
from lab.machine import add_plan_options, read_machine
from lab.problems import INSTRUCTION, Columns
from lab.recipe import load_recipe, override_values

ROOT = Path(__file__).resolve().parent.parent  # of the program


def bounded(kind: type, low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a finite number of at least `low` (or above it), and at most `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= (sys.float_info.max if high is None else high) or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high else "")
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return number


def user_path(text: str) -> Path:
    """Return a path of the command line; a shell leaves the ~ in --out=~/runs to the program."""
    return Path(expanduser(text))


TAKEN = {"compare": ("out",), "regrade": ("out", "thinking", "reward", "workers", "most_failed_share")}
COUNT, SHARE = bounded(int, 1), bounded(float, 0, 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, and adds the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default in (None, [], Columns()) or action.default is False or "default" in (action.help or "")
        return action.help if unset else super()._get_help_string(action)


def new_parser(doc: str | None = None, **options) -> argparse.ArgumentParser:
    """Return a parser without abbreviations, whose help keeps a description's examples and shows defaults."""
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **options)


def parse_columns(text: str) -> Columns:
    """Parse problem=Q,answer=A."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    known = [field.name for field in fields(Columns)]
    if not all(field in known and name for field, _, name in pairs):
        raise argparse.ArgumentTypeError(f"must be FIELD=NAME,... with fields of {', '.join(known)}, not {text}")
    return Columns(**{field: name for field, _, name in pairs})


def reading_options() -> argparse.ArgumentParser:
    """Return a parent parser with the options of all commands that read problems."""
    parent = new_parser(add_help=False)
    what = "leave out problems without an answer, and prompts too long for the model"
    parent.add_argument("--skip-bad-rows", action="store_true", help=what)
    what = "problem=Q,answer=A: the data's columns, where its names are not known ones"
    parent.add_argument("--columns", type=parse_columns, default=Columns(), metavar="FIELD=NAME,...", help=what)
    parent.add_argument("--limit", type=COUNT, metavar="N", help="only the first N problems of a data set")
    return parent


def model_options(n: int | None = None, top_k: int = 20, greedy: bool = True) -> argparse.ArgumentParser:
    """Return a parent parser with the options of all commands that sample from a model."""
    parent = new_parser(add_help=False)
    add = parent.add_argument
    own = "(default: as the model's run has it"
    add("-n", type=COUNT, default=n, help="responses per problem" + f" {own}, else 8)" * (n is None))
    add("--temperature", type=bounded(float, 0, above=not greedy), help=f"{'0 is greedy ' * greedy}{own}, else 1.4)")
    add("--top-k", type=bounded(int, 0), help=f"0 is off {own}, else {top_k})")
    add(
        "--top-p",
        type=bounded(float, 0, 1, above=True),
        default=1.0,
        help="sample from this share of the mass; 1 is off",
    )
    add("--max-tokens", type=COUNT, help=f"of a response {own}, else 8192)")
    what = "whether only a box after </think> counts; given to the template, which decides auto"
    add("--thinking", choices=("auto", "true", "false"), help=f"{what} {own}, else auto)")
    add("--no-thinking", dest="thinking", action="store_const", const="false", help="--thinking false")
    add("--instruction", help=f"appended to problems that do not contain it {own}, else {INSTRUCTION!r})")
    add("--seed", type=bounded(int, 0), default=0, help="of the sampling")
    add("--rows", type=COUNT, default=64, help="sequences decoded at once")
    add("--cache-tokens", type=COUNT, help="of all sequences together (default: what the rows need, if memory allows)")
    add("--reward", metavar="FILE.py:NAME", help="call NAME(text, row) instead of comparing answers")
    add("--workers", type=COUNT, default=2, help="processes that grade symbolic answers, or call the reward function")
    add("--most-failed-share", type=float, default=0.02, help="stop if the grader fails on more of the answers")
    return parent


def training_arguments(doc: str | None) -> argparse.Namespace:
    """Parse the command line of train.py. Exits if the recipe cannot be read, and after --plan."""
    parser = new_parser(doc)
    add = parser.add_argument
    what = "a file with every setting of the run that is no default; `python -m lab.recipe` lists all of them"
    add("recipe", nargs="?", type=user_path, default=ROOT / "recipes" / "tiny.toml", help=what)
    what = "instead of the recipe's value; repeatable; stage.*.KEY is of all stages, KEY=A,B a sweep"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=what)
    add("--seeds", nargs="+", default=[], metavar="SEED", help="--set seed=A,B: a sweep over these seeds")
    add("--nproc-per-node", metavar="N", help="of a sweep: processes of each run, which torchrun starts")
    add("--out", type=user_path, default=Path("runs"), help="where the run's folder is created")
    add(
        "--resume", nargs="?", const=True, type=user_path, metavar="RUN",
        help="resume this run; without RUN the newest unfinished run of the recipe, or start one",
    )  # fmt: skip
    add("--resume-anyway", action="store_true", help="resume even if the recipe, data, model or code have changed")
    add("--plan", action="store_true", help="estimate memory, time and cost, and run nothing")
    add_plan_options(parser)
    arguments = parser.parse_args()
    arguments.resume = arguments.resume or arguments.resume_anyway or None
    if isinstance(arguments.resume, Path) and arguments.resume.suffix == ".toml":
        parser.error("put the recipe before --resume, which takes the folder of a run")
    if isinstance(arguments.resume, Path) and arguments.plan:
        parser.error("--plan takes a recipe, such as RUN/recipe.toml, not --resume RUN")
    if isinstance(arguments.resume, Path) and arguments.recipe is not parser.get_default("recipe"):
        parser.error(f"--resume RUN has a recipe of its own: leave out {arguments.recipe}; --set changes a value")
    arguments.set += [f"seed={','.join(arguments.seeds)}"] * bool(arguments.seeds)
    sweeps = any(len(override_values(override.partition("=")[2])) > 1 for override in arguments.set)
    if arguments.nproc_per_node and not sweeps:
        parser.error("--nproc-per-node is of a sweep; for one run: torchrun --nproc-per-node N train.py")
    try:
        if sweeps and not arguments.plan and not isinstance(arguments.resume, Path):
            from lab.sweep import run_sweep  # needs torch

            sys.exit(run_sweep(arguments))
        if not isinstance(arguments.resume, Path):
            recipe = load_recipe(arguments.recipe, arguments.set)
        if arguments.plan:
            from lab.plan import show_plan  # needs torch

            sys.exit(not show_plan(recipe, read_machine(arguments), arguments.recipe.parent))
    except UserError as error:
        sys.exit(f"train.py: {error}" if os.environ.get("RANK", "0") == "0" else 1)  # printed by one process only
    return arguments


def add_yarn_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of YaRN."""
    add = parser.add_argument
    add("--yarn", type=float, metavar="FACTOR", help="extend the model's window by this factor")
    add("--original-window", type=COUNT, metavar="TOKENS", help="the window that YaRN extends (default: the config's)")
    add("--attention-factor", type=float, help="YaRN's scale of cos and sin (default: 1, off, as in POLARIS)")
    add(
        "--beta-fast", type=float, help="rotations over the original window above which a dimension stays (default: 32)"
    )
    add("--beta-slow", type=float, help="and below which it is interpolated fully (default: 1)")


def yarn_settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Collect the options of YaRN as `arguments.yarn`, the arguments of model.extend_window; None without --yarn."""
    names = {"original_window": None, "attention_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    given = {name: value for name in names if (value := vars(arguments).pop(name)) is not None}
    if given and arguments.yarn is None:
        parser.error(f"--{next(iter(given)).replace('_', '-')} requires --yarn")
    arguments.yarn = None if arguments.yarn is None else {"factor": arguments.yarn, **names, **given}


def evaluation_arguments(doc: str | None) -> argparse.Namespace:
    """Parse the command line of eval.py; `doc` is the start of --help."""
    parser = new_parser(doc, parents=[model_options(), reading_options()])
    add = parser.add_argument
    add("model", nargs="?", type=expanduser, help="a model folder or hub id")
    add("--data", action="append", type=expanduser, help="a known benchmark, file, folder of files or hub data set")
    add("--folder", type=user_path, help="where to search for known benchmarks before the hub")
    add_yarn_options(parser)
    add(
        "--trained-length", type=COUNT,
        help="the length bands are fractions of this (default: YaRN's original window, else --max-tokens)",
    )  # fmt: skip
    what = "a new folder, or one to resume in (default: runs/eval, runs/eval-2, ...: the one of this command, else new)"
    add("--out", type=user_path, help=what)
    add("--curve", nargs="+", metavar=("KIND", "FROM:TO:STEP"), help='"temperature 0.6:1.7:0.1", or "length"')
    add("--match", type=expanduser, metavar="RUN|SCORE", help="search upward for the temperature of this distinct-4")
    add("--margin", type=SHARE, help="sufficient half width of a 95%% interval (0: all problems)")
    add("--compare", nargs="+", type=user_path, metavar="A", help="folders of results, each with the first: B minus A")
    add("--regrade", type=user_path, metavar="RUN", help="grade the responses of a folder again")
    arguments = parser.parse_args()
    if arguments.compare or arguments.regrade:
        if arguments.model or arguments.data:
            parser.error("--compare and --regrade read folders of results: give no model and no --data")
        if arguments.compare and len(arguments.compare) < 2:
            parser.error("--compare takes at least two folders of results")
        refuse_ignored(parser, arguments, "regrade" if arguments.regrade else "compare")
        return arguments
    if not arguments.model or not arguments.data:
        parser.error("a model and at least one --data are required")
    yarn_settings(parser, arguments)
    if arguments.curve and arguments.match:
        parser.error("--curve and --match exclude each other")
    kind, *values = arguments.curve or [None]
    if (kind, len(values)) not in ((None, 0), ("temperature", 1), ("length", 0)):
        parser.error('--curve is "temperature FROM:TO:STEP" or "length"')
    arguments.temperatures = []
    if kind == "temperature":
        if arguments.temperature is not None:
            parser.error("--curve temperature sets the temperatures: give no --temperature")
        arguments.temperatures = temperatures_of(values[0])
        if not arguments.temperatures:
            parser.error(f"--curve temperature needs FROM:TO:STEP, for example 0.6:1.7:0.1, not {values[0]}")
    if arguments.temperature == 0 and (arguments.n or 0) > 1:
        parser.error("at temperature 0 all responses to a problem are equal: use -n 1")
    return arguments


def refuse_ignored(parser: argparse.ArgumentParser, arguments: argparse.Namespace, command: str) -> None:
    """Refuse the options that --compare or --regrade would ignore."""
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    if ignored := [name for name in given if name not in (command, *TAKEN[command])]:
        flags = {name: f"--{name}".replace("_", "-") for name in vars(arguments)} | {"n": "-n"}
        unused, taken = (", ".join(flags[name] for name in names) for names in (ignored, TAKEN[command]))
        parser.error(f"leave out {unused}, which --{command} does not use; it takes only {taken}")
    if arguments.thinking == "auto":
        parser.error("--regrade has no template to decide --thinking auto: give true or false")


def temperatures_of(text: str) -> list[float]:
    """Parse FROM:TO:STEP into 2 to 100 temperatures above 0; [] if it is invalid."""
    try:
        first, last, step = map(float, text.split(":"))
        count = int((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        return []
    return [round(first + i * step, 6) for i in range(count)] if 2 <= count <= 100 and first > 0 < step else []


def question_arguments(doc: str | None) -> argparse.Namespace:
    """Parse the command line of ask.py; `doc` is the start of --help."""
    parser = new_parser(doc, parents=[model_options(n=1)])
    add = parser.add_argument
    add("model", type=expanduser, help="a model folder or hub id")
    add("question", nargs="?", help="default: one on each line of the input, or as you type them")
    add("--answer", help="the right one, to grade by")
    add("--show-thinking", action="store_true", help="print what comes before </think> as well")
    return parser.parse_args()


def difficulty_arguments(doc: str | None) -> argparse.Namespace:
    """Parse the command line of data_filter.py; `doc` is the start of --help."""
    parser, reading, batch = new_parser(doc), reading_options(), new_parser(add_help=False)
    commands = parser.add_subparsers(dest="command", required=True)
    batch.add_argument("--batch", type=COUNT, default=1, help="fail if fewer problems than this are left")

    def new_command(name: str, what: str, example: str, *parents: argparse.ArgumentParser) -> Callable:
        """Return the `add_argument` of a new command."""
        more = {
            "description": f"{what}\n\n    python data_filter.py {name} {example}",
            "formatter_class": HelpFormatter,
        }
        return commands.add_parser(name, help=what, parents=parents, allow_abbrev=False, **more).add_argument

    example = "Qwen/Qwen3-4B math.jsonl --max-tokens 38912 --temperature 1.4"
    add = new_command("estimate", "Pass rates of a model.", example, model_options(top_k=0, greedy=False), reading)
    add("model", type=expanduser, help="a model folder or hub id")
    add("data", type=expanduser, help="a file of problems or a hub data set")
    add("--out", type=user_path, default=Path("pass-rates.jsonl"), help="a new file, or one to resume")
    add("--recipe", type=user_path, help="say what the rates mean for it (default: POLARIS's settings, 3 epochs)")

    what, example = "Drop the problems that are always solved.", "pass-rates.jsonl math.jsonl train.jsonl"
    add = new_command("filter", what, example, reading, batch)
    add("pass_rates", type=user_path, help="the output of estimate")
    add("data", type=expanduser, help="the problems that were estimated")
    add("out", type=user_path, help="a new .jsonl file")
    add("--drop-at", type=SHARE, default=1.0, help="drop pass rates of at least this")
    add("--keep-above", type=SHARE, default=0.0, help="drop pass rates below this")
    add("--max-unsolved-share", type=SHARE, help="of the kept problems: drop other unsolved ones at random")
    add("--seed", type=bounded(int, 0), default=0, help="for that draw")

    what, example = "Drop the problems that a run has learned.", "runs/tiny train.jsonl next.jsonl"
    add = new_command("drop", what, example, reading, batch)
    add("run", type=user_path, help="the folder of a run of train.py")
    add("data", type=expanduser, help="the problems that it was trained on")
    add("out", type=user_path, help="a new .jsonl file")
    add("--stage", type=int, help="the stage that has just ended (default: the last that ended)")
    add("--above", type=SHARE, help="drop accuracy above this (default: the run's, 0.9)")
    add("--window", choices=("stage", "all"), help="the visits to count (default: the run's, stage)")

    arguments = parser.parse_args()
    if arguments.out.suffix != ".jsonl":
        parser.error(f"{arguments.out} must end in .jsonl")
    return arguments
