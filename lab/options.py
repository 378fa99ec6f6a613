"""The command lines of train.py, eval.py and data_filter.py. Nothing heavy is imported: --help and mistakes are answered at once.

What makes no sense is an error before anything is loaded.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from engine.errors import UserError
from lab.machine import add_plan_options, read_machine
from lab.problems import INSTRUCTION
from lab.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent  # of the program

AT_LEAST_ONE = (
    "n", "max_tokens", "rows", "cache_tokens", "workers", "limit", "batch", "trained_length", "original_window",
)  # fmt: skip


def new_parser(doc: str | None = None, **options) -> argparse.ArgumentParser:
    """A parser that takes no abbreviations and shows its description as it is written."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False, **options)


def reading_options() -> argparse.ArgumentParser:
    """Options of all commands that read problems, as a parent."""
    parent = new_parser(add_help=False)
    parent.add_argument("--skip-bad-rows", action="store_true", help="leave problems without an answer out")
    parent.add_argument("--limit", type=int, help="only the first so many problems of a set")
    return parent


def model_options() -> argparse.ArgumentParser:
    """Options of all commands that sample from a model, as a parent."""
    parent = new_parser(add_help=False)
    parent.add_argument("-n", type=int, default=8, help="responses per problem")
    parent.add_argument("--top-p", type=float, default=1.0)
    parent.add_argument("--max-tokens", type=int, default=8192, help="of a response")
    parent.add_argument("--no-thinking", action="store_true", help="the model does not think: the box alone counts")
    parent.add_argument("--instruction", default=INSTRUCTION, help="appended to problems that do not carry it")
    parent.add_argument("--seed", type=int, default=0)
    parent.add_argument("--rows", type=int, default=64, help="sequences decoded at once")
    parent.add_argument("--cache-tokens", type=int, help="of all sequences together (default: every row full)")
    parent.add_argument("--workers", type=int, default=2, help="processes that grade symbolic answers")
    parent.add_argument("--most-failed-share", type=float, default=0.02, help="failures of the grader that stop")
    return parent


def check_bounds(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error where an option, of those that this command has, is out of bounds."""
    given = vars(arguments)
    for name in AT_LEAST_ONE:
        if given.get(name) is not None and given[name] < 1:
            parser.error(f"{'-n' if name == 'n' else '--' + name.replace('_', '-')} must be at least 1")
    for name in ("drop_at", "keep_above", "max_unsolved_share", "above"):
        if given.get(name) is not None and not 0 <= given[name] <= 1:
            parser.error(f"--{name.replace('_', '-')} is a share, such as 0.9")
    if given.get("top_k", 0) < 0 or not 0 < given.get("top_p", 1.0) <= 1:
        parser.error("--top-k must not be negative, and --top-p lies above 0 and at most at 1")


def training_arguments(doc: str | None) -> argparse.Namespace:
    """The command line of train.py. A recipe that cannot be read ends the program here; so does --plan, answered."""
    parser = new_parser(doc)
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes" / "tiny.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="such as stage.1.temperature=1.1"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder is made")
    parser.add_argument(
        "--resume", nargs="?", const=True, type=Path, metavar="RUN",
        help="go on with this run, or without a name with the newest unfinished one of the recipe, if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--resume-anyway", action="store_true", help="although recipe, data, model or code are not what they were"
    )
    parser.add_argument("--plan", action="store_true", help="say what memory, time and money it takes, and run nothing")
    add_plan_options(parser)
    arguments = parser.parse_args()
    arguments.resume = arguments.resume or arguments.resume_anyway or None
    try:
        if arguments.plan or not isinstance(arguments.resume, Path):
            recipe = load_recipe(arguments.recipe, arguments.set)
        if arguments.plan:
            from lab.plan import show_plan  # which needs torch

            sys.exit(not show_plan(recipe, read_machine(arguments)))
    except UserError as error:
        sys.exit(f"train.py: {error}" if os.environ.get("RANK", "0") == "0" else 1)  # said by one process of several
    return arguments


def evaluation_arguments(doc: str | None) -> argparse.Namespace:
    """The command line of eval.py; `doc` is what --help says first."""
    parser = new_parser(doc, parents=[model_options(), reading_options()])
    add = parser.add_argument
    add("model", nargs="?", help="a model folder or hub id")
    add("--data", action="append", help="a known benchmark, a file, a folder of files or a hub data set")
    add("--folder", type=Path, help="where the files of known benchmarks are, before the hub is asked")
    add("--temperature", type=float, help="default: 1.4; 0 is greedy")
    add("--top-k", type=int, default=20, help="0 is off")
    add("--yarn", type=float, metavar="FACTOR", help="lengthen the model's window by this factor")
    add("--original-window", type=int, help="the window that YaRN lengthens (default: the config's)")
    add(
        "--trained-length", type=int,
        help="tokens of which the length bands are fractions (default: YaRN's original window, else --max-tokens)",
    )  # fmt: skip
    add("--out", type=Path, default=Path("runs/eval"), help="a new folder, or one to go on in")
    add("--curve", nargs="+", metavar=("KIND", "FROM:TO:STEP"), help='"temperature 0.6:1.7:0.1", or "length"')
    add("--match", metavar="RUN|SCORE", help="search upward for the temperature of this distinct-4")
    add("--margin", type=float, help="half width of a 95%% interval that is enough (0: all problems)")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two folders of results, B minus A")
    add("--regrade", type=Path, metavar="RUN", help="grade the responses of a folder again")
    arguments = parser.parse_args()
    check_bounds(parser, arguments)
    if arguments.compare or arguments.regrade:
        if arguments.model or arguments.data:
            parser.error("--compare and --regrade read folders of results: give no model and no --data")
        return arguments
    if not arguments.model or not arguments.data:
        parser.error("a model and at least one --data are needed")
    if arguments.margin is not None and not 0 <= arguments.margin < 1:
        parser.error("--margin is a share, such as 0.03")
    if arguments.original_window and arguments.yarn is None:
        parser.error("--original-window belongs to --yarn")
    if arguments.curve and arguments.match:
        parser.error("--curve and --match are two things to do: give one of them")
    kind, *values = arguments.curve or [None]
    if (kind, len(values)) not in ((None, 0), ("temperature", 1), ("length", 0)):
        parser.error('--curve is "temperature FROM:TO:STEP" or "length"')
    arguments.temperatures = []
    if kind == "temperature":
        if arguments.temperature is not None:
            parser.error("--curve temperature has its own temperatures: give no --temperature")
        arguments.temperatures = temperatures_of(values[0])
        if not arguments.temperatures:
            parser.error(f"--curve temperature needs FROM:TO:STEP, such as 0.6:1.7:0.1, not {values[0]}")
    arguments.temperature = 1.4 if arguments.temperature is None else arguments.temperature
    if not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature {arguments.temperature} is no temperature: take 0 or more")
    if arguments.temperature == 0 and arguments.n > 1:
        parser.error("at temperature 0 all responses to a problem are the same: take -n 1")
    return arguments


def temperatures_of(text: str) -> list[float]:
    """FROM:TO:STEP as at least two and at most 100 temperatures above 0; [] where it is not that."""
    try:
        first, last, step = map(float, text.split(":"))
        count = int((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        return []
    return [round(first + i * step, 6) for i in range(count)] if 2 <= count <= 100 and first > 0 < step else []


def difficulty_arguments(doc: str | None) -> argparse.Namespace:
    """The command line of data_filter.py; `doc` is what --help says first."""
    parser, reading, batch = new_parser(doc), reading_options(), new_parser(add_help=False)
    commands = parser.add_subparsers(dest="command", required=True)
    batch.add_argument("--batch", type=int, default=1, help="problems of a training step: fewer left are an error")

    ask = commands.add_parser(
        "estimate", parents=[model_options(), reading], help="pass rates of a model", allow_abbrev=False
    )
    ask.add_argument("model", help="a model folder or hub id")
    ask.add_argument("data", help="a file of problems or a hub data set")
    ask.add_argument("--temperature", type=float, default=1.4, help="at which training will begin")
    ask.add_argument("--top-k", type=int, default=0, help="0 is off, as training samples")
    ask.add_argument("--out", type=Path, default=Path("pass-rates.jsonl"), help="a new file, or one to go on with")

    sift = commands.add_parser("filter", parents=[reading, batch], help="drop the always solved", allow_abbrev=False)
    sift.add_argument("pass_rates", type=Path, help="what estimate wrote")
    sift.add_argument("data", help="the problems that were estimated")
    sift.add_argument("out", type=Path, help="a new .jsonl file")
    sift.add_argument("--drop-at", type=float, default=1.0, help="drop what is solved this often or more often")
    sift.add_argument("--keep-above", type=float, default=0.0, help="drop what is solved less often than this")
    sift.add_argument("--max-unsolved-share", type=float, help="of what is kept: drop others of them at random")
    sift.add_argument("--seed", type=int, default=0, help="of that draw")

    drop = commands.add_parser("drop", parents=[reading, batch], help="drop what a run has learnt", allow_abbrev=False)
    drop.add_argument("run", type=Path, help="the folder of a run of train.py")
    drop.add_argument("data", help="the problems that it was trained on")
    drop.add_argument("out", type=Path, help="a new .jsonl file")
    drop.add_argument("--stage", type=int, help="the stage just ended (default: the last that ended)")
    drop.add_argument("--above", type=float, help="drop what is solved more often (default: the run's, 0.9)")
    drop.add_argument("--window", choices=("stage", "all"), help="by which visits (default: the run's, stage)")

    arguments = parser.parse_args()
    check_bounds(parser, arguments)
    if arguments.command == "estimate" and not 0 < arguments.temperature < math.inf:
        parser.error(f"--temperature {arguments.temperature} cannot be trained at: take one above 0")
    if arguments.out.suffix != ".jsonl":
        parser.error(f"{arguments.out} must end in .jsonl")
    return arguments
