r"""Ask a model: watch one answer being written, or let several vote.

    python ask.py runs/tiny/stage-3 "4 + 8 - 6"                    # one answer, as it is sampled
    python ask.py runs/tiny/stage-3 "4 + 8 - 6" -n 8 --answer 6    # eight, their boxes, the majority, the verdicts
    python ask.py runs/tiny/stage-3                                # question by question; Ctrl-D ends
    python ask.py runs/tiny/stage-3 < questions.txt                # one on each line

A model that train.py has made is asked as it was evaluated there: instruction, temperature, top-k, limit. Its thinking
is one line, a count of tokens; --show-thinking prints it. Ctrl-C stops an answer. Questions do not see earlier ones.
"""

if __name__ == "__main__":  # --help and argument errors need no torch
    from engine.terminal import prepare_terminal

    prepare_terminal()
    from lab.options import question_arguments

    ARGUMENTS = question_arguments(__doc__)

import signal
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress

from engine.errors import UserError, sentence
from engine.rollout_worker import RolloutWorker
from engine.sharding import gathered
from lab.answers import normal_form
from lab.command import load_worker, run_command
from lab.problems import Problem
from lab.recipe import SamplerSettings
from reward import response_body
from rollout import CacheLimits, Sampling, generate

with suppress(ImportError):
    import readline  # noqa: F401  # input() then edits a line and recalls earlier ones


def questions(given: str | None) -> Iterator[str]:
    """Yield the question of the command line, or those of the input."""
    if given is not None:
        yield given
    while given is None:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line.strip():
            yield line


def ask(worker: RolloutWorker, sampling: Sampling, problem: Problem, arguments: Namespace) -> None:
    """Print n answers to a question, a single one as it is sampled; then each one's box, and the majority."""
    prompt, boxes = worker.prompt(problem, arguments.n), []
    limits = CacheLimits(arguments.cache_tokens or 0, SamplerSettings.page_tokens, arguments.rows)
    graded, folded = bool(problem.answers or worker.grader.reward), worker.chat.thinking and not arguments.show_thinking
    over = "\r" * sys.stderr.isatty()  # a terminal shows the count of words as it grows
    printed = None  # characters of the answer on the screen; None while the thinking is counted
    with gathered(worker.model):
        for rollout in generate(worker.model, [prompt], sampling, limits, live=arguments.n == 1):
            text, ended = worker.chat.decode(rollout.tokens), bool(rollout.finish_reason)
            text = text if ended else text.rstrip("\ufffd")  # the beginning of a character
            body = response_body(text, folded)
            if folded and printed is None and (over or ended or body is not None):
                words, end = len(text.removesuffix(body or "").split()), "" if body is None and not ended else "\n"
                print(f"{over}thinking: {words} words", end=end, file=sys.stderr, flush=True)
            if body is not None:
                print(body.lstrip()[printed or 0 :], end="", flush=True)
                printed = len(body.lstrip())
            if ended:
                grade = worker.grader.grade([(text, problem.answers)])[0]
                said = ("no box" if grade.answer is None else grade.answer) + f" ({grade.verdict})" * graded
                boxes += [] if grade.answer is None else [(normal_form(grade.answer), said)]
                which = f" {rollout.index + 1} of {arguments.n}" * (arguments.n > 1)
                cut = ", cut at the limit" * (rollout.finish_reason == "length")
                print(f"\nanswer{which}: {said}, {len(rollout.tokens)} tokens{cut}", flush=True)
                printed = None
    votes = Counter(form for form, _ in boxes)
    if arguments.n > 1 and boxes:
        leaders = [said for form, said in dict(boxes).items() if votes[form] == max(votes.values())]
        print(f"majority: {' and '.join(leaders)}, {max(votes.values())} of {arguments.n}")


def command(arguments: Namespace) -> None:
    """Answer every question. Ctrl-C stops the answer under way."""
    with redirect_stdout(sys.stderr):  # the answers alone go to the output
        worker, sampling, _ = load_worker(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="replace")
    answers = () if arguments.answer is None else (arguments.answer,)
    with worker.grader:
        for number, question in enumerate(questions(arguments.question), 1):
            try:
                ask(worker, sampling, Problem(f"question {number}", question, answers), arguments)
            except KeyboardInterrupt:
                print("\nstopped", file=sys.stderr)
                if arguments.question is not None:
                    sys.exit(128 + signal.SIGINT)
            except UserError as error:
                if arguments.question is not None:
                    raise
                print(f"ask.py: {sentence(error)}", file=sys.stderr)


if __name__ == "__main__":
    run_command("ask.py", command, ARGUMENTS)
