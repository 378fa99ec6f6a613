"""What the code cites is there: sections of RECIPE.md, and the files and functions that RECIPE.md and README name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for pattern in ("*.py", "*/*.py", "recipes/*.toml") for path in sorted(ROOT.glob(pattern))]
CITATION = re.compile(r"RECIPE(?:\.md)?('s)?,?\s+(?:#\s+)?sections?\s+(\d+)(?:\s+(?:and|to)\s+(\d+))?")


def sections() -> set[int]:
    return {int(number) for number in re.findall(r"^## (\d+)\.", (ROOT / "RECIPE.md").read_text(), re.MULTILINE)}


def test_the_sections_of_the_recipe_are_numbered_without_gaps():
    assert sections() == set(range(1, len(sections()) + 1)) and len(sections()) >= 9


def test_every_section_that_the_code_cites_is_there():
    cited = {
        (path.name, int(number))
        for path in SOURCES
        for match in CITATION.finditer(path.read_text())
        for number in match.groups()[1:]
        if number
    }
    assert len(cited) > 10
    assert not {(name, number) for name, number in cited if number not in sections()}


def recipe_keys() -> set[str]:
    """Every key of a recipe, by its own name."""
    tree = ast.parse((ROOT / "lab" / "recipe.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {inner.target.id for node in classes for inner in node.body if isinstance(inner, ast.AnnAssign)}


def names_of(path: Path) -> set[str]:
    """Top-level names of a module, and the methods of its classes as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("document", ["RECIPE.md", "README.md"])
def test_every_file_and_function_that_a_document_names_is_there(document):
    text = (ROOT / document).read_text()
    modules = {path.stem: path for pattern in ("*.py", "engine/*.py", "lab/*.py") for path in ROOT.glob(pattern)}
    named = re.findall(r"`(?:(?:engine|lab)[./])?(\w+)\.(\w+(?:\.\w+)?)`", text)
    wrong = []
    for module, name in named:
        if name in ("jsonl", "json", "toml", "html"):
            continue
        if name == "py":
            wrong += [] if module in modules or list(ROOT.glob(f"*/{module}.py")) else [f"{module}.py"]
        elif module in modules and name not in names_of(modules[module]) | recipe_keys():
            wrong.append(f"{module}.{name}")
    assert not wrong
