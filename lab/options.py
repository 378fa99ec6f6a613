"""The command lines, light enough to answer --help and mistakes before torch is imported."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from lab.machine import add_plan_options, read_machine
from lab.problems import DataError
from lab.recipe import RecipeError, load_recipe

ROOT = Path(__file__).resolve().parent.parent  # of the program


def training_arguments(description: str) -> argparse.Namespace:
    """The command line of train.py; a recipe that cannot be read ends the program here. --plan is answered here too."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
            from lab.plan import show_plan

            sys.exit(not show_plan(recipe, read_machine(arguments)))
    except (RecipeError, DataError) as error:
        refuse("train.py", error)
    return arguments


def refuse(program: str, error: Exception) -> NoReturn:
    """End with one sentence, said by one process of several."""
    sys.exit(f"{program}: {error}" if os.environ.get("RANK", "0") == "0" else 1)
