"""The data of a recipe: its problems, what the guard excludes, and the worked solutions of sft stages.

All of it is the same on every process and after a resume.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from lab.benchmarks import find_data
from lab.data_files import DataError
from lab.problems import Problem, benchmark_copies, duplicated, has_chats, read_chats, read_problems
from lab.recipe import Recipe, RlStage, SftStage, how_to_read

PAIRS_NAMED = 3  # copies named in messages and metrics


problems_of = cache(read_problems)  # a file or hub dataset, once per process


def rl_source(recipe: Recipe, index: int) -> str:
    """Return the data of an rl stage: its own, or of the last rl stage before it that has some."""
    return next(s.data for s in recipe.stage[index::-1] if isinstance(s, RlStage) and s.data)


@dataclass
class RunData:
    """The data of one run; `folder` is the run's folder."""

    recipe: Recipe
    folder: Path
    excluded: dict[tuple[str, str], set[str]] = field(
        default_factory=dict
    )  # ids by (kind of stage, data), set by `guard`

    def path(self, source: str) -> str:
        """Return world/... as a path in the run's folder, and anything else (a file or a hub dataset) unchanged."""
        return str(self.folder / source) if source.startswith("world/") else source

    def problems(self, source: str, kind: str = "") -> list[Problem]:
        """Return all problems of a source as a kind of stage reads it; by default sft if no other reads it."""
        on_bad_row, rewarded, columns = how_to_read(self.recipe, source)
        users = [user for user in (*self.recipe.stage, self.recipe.eval, self.recipe.final) if user.data == source]
        if kind == "sft" or (not kind and users and all(isinstance(user, SftStage) for user in users)):
            return problems_of(self.path(source), on_bad_row, False, columns, True)
        return problems_of(self.path(source), on_bad_row, rewarded, columns)

    def training_problems(self, kind: str, source: str) -> list[Problem]:
        """Return a source's problems without those that the guard excludes."""
        excluded = self.excluded.get((kind, source), ())
        return [problem for problem in self.problems(source, kind) if problem.id not in excluded]

    def worked_examples(self, stage: SftStage) -> Iterator[tuple[str, list[dict] | Problem, str]]:
        """Yield the examples of an sft stage: a name for errors, the prompt as a chat or a problem, the reply.

        Every reply of a chat is an example, with all messages before it as its prompt.
        """
        if has_chats(path := self.path(stage.data)):
            excluded = self.excluded.get(("sft", stage.data), ())
            for number, messages in enumerate(read_chats(path), 1):
                for turn, message in enumerate(messages):
                    if message["role"] == "assistant" and f"row {number}" not in excluded:
                        yield f"row {number}", messages[:turn], message["content"]
            return
        for problem in self.training_problems("sft", stage.data):
            if not problem.solution:
                raise DataError(f"problem {problem.id} in {stage.data} has no worked solution to learn from")
            yield f"problem {problem.id}", problem, problem.solution

    # ------------------------------------------------------------------------------------------------- the guard

    def guard(self, say: Callable[[str], None]) -> list[dict]:
        """Find training problems that copy another or a benchmark's; exclude what [guard] says. Return metrics rows."""
        guard, benchmark, rows = self.recipe.guard, [], []
        for source in dict.fromkeys(filter(None, [self.recipe.eval.data, self.recipe.final.data])):
            benchmark += self.problems(source)
            if pairs := duplicated(self.problems(source)):
                say(f"{source}: {len(pairs):,} problems repeat an earlier one's text ({_name_pairs(pairs)})")
        for source in find_data(guard.benchmarks).values():
            benchmark += read_problems(
                source, "keep", columns=how_to_read(self.recipe, source)[2]
            )  # a comparison needs no answer
        seen: dict[str, dict[str, Problem]] = {"sft": {}, "rl": {}}
        texts: dict[str, str] = {}  # by id, of all rl stages: histories and sinks know a problem by its id alone
        for index, stage in enumerate(self.recipe.stage):
            place = stage.kind, stage.data
            if not stage.data or place in self.excluded:
                continue
            asked, learned = self._texts(stage)
            for problem in asked if isinstance(stage, RlStage) else ():
                if texts.setdefault(problem.id, problem.text) != problem.text:
                    raise DataError(
                        f"{stage.data}: {problem.id} is another problem than in an earlier stage's data: rename one of "
                        "the files, whose names begin their problems' ids"
                    )
            found = {
                "duplicates": (guard.duplicates, "repeat an earlier one's text", duplicated(learned, seen[stage.kind])),
                "contamination": (guard.contamination, "are a benchmark's", benchmark_copies(asked, benchmark)),
            }
            excluded = {p.id for rule, _, pairs in found.values() if rule == "exclude" for p, _ in pairs}
            self.excluded[place] = excluded
            row = {"kind": "guard", "step": 0, "stage": index, "data": stage.data, "rows": len(learned)}
            for name, (rule, what, pairs) in found.items():
                count, first = len({problem.id for problem, _ in pairs}), [[a.id, b.id] for a, b in pairs[:PAIRS_NAMED]]
                row |= {name: count, f"{name}_first": first, f"{name}_rule": rule}
                if pairs:
                    done = (
                        "excluded" if rule == "exclude" else f'kept in training (guard.{name} = "exclude" drops them)'
                    )
                    say(f"{stage.data}: {count:,} of {len(learned):,} {what} ({_name_pairs(pairs)}): {done}")
            rows.append(row | {"excluded": len(excluded), "excluded_ids": sorted(excluded)})
        return rows

    def _texts(self, stage: SftStage | RlStage) -> tuple[list[Problem], list[Problem]]:
        """Return a stage's data as problems to compare with benchmarks, and as problems to compare with one another.

        Fine-tuning may use several solutions of a problem, so two of its rows are copies only with the same solution.
        """
        if isinstance(stage, SftStage) and has_chats(path := self.path(stage.data)):
            chats = [(f"row {number}", messages) for number, messages in enumerate(read_chats(path), 1)]
            asked = [Problem(name, m["content"], ()) for name, chat in chats for m in chat if m["role"] == "user"]
            return asked, [Problem(name, "\n".join(m["content"] for m in chat), ()) for name, chat in chats]
        asked = self.problems(stage.data, stage.kind)
        return asked, asked if isinstance(stage, RlStage) else [replace(p, text=p.text + p.solution) for p in asked]


def by_ids(problems: list[Problem], ids: list[str], source: str) -> list[Problem]:
    """Return the problems with these ids, in order; raise DataError if some are missing."""
    by_id = {problem.id: problem for problem in problems}
    if missing := [problem_id for problem_id in ids if problem_id not in by_id]:
        raise DataError(
            f"{source}: {len(missing):,} of the {len(ids):,} problems that this run trains on are missing "
            f"(first: {missing[0]}): resume with the data and the [guard] that it began with"
        )
    return [by_id[problem_id] for problem_id in ids]


def _name_pairs(pairs: list[tuple[Problem, Problem]]) -> str:
    return ", ".join(f"{a.id} is {b.id}" for a, b in pairs[:PAIRS_NAMED]) + ", ..." * (len(pairs) > PAIRS_NAMED)
