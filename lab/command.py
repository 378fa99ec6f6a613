"""What eval.py and data_filter.py share as commands: a model that answers, and an end that says why."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from engine import device as devices
from engine.attempts import GraderError, Respondent
from engine.device import Interrupted, StopRequest
from engine.grader import Grader
from engine.tokenizer import load_tokenizer, stop_tokens
from lab.metrics import MetricsError
from lab.problems import DataError, Problem
from model import ModelError, extend_window, load, resolve_folder, tokenizer_folder
from rollout import KERNEL_PAGE_TOKENS, CacheLimits, RolloutError, Sampling, cache_bytes_per_token, check_requests

EXPECTED_ERRORS = (ModelError, DataError, RolloutError, GraderError, MetricsError, OSError)


def load_respondent(
    arguments: argparse.Namespace,
    problems: Sequence[Problem],
    stopping: str,
    draw: int = 0,
    yarn: float | None = None,
    original_window: int | None = None,
) -> tuple[Respondent, Sampling, Path]:
    """A model loaded to answer these problems as a command line says (lab.options.model_options), and its folder.

    `stopping` is what is said when a signal stops it; `draw` is the step that samples are counted from. The caller
    closes its grader. Raises ModelError, DataError or RolloutError for what would go wrong later.
    """
    here, folder = devices.start(), resolve_folder(arguments.model)
    model, tokenizer_from = load(folder, here.device, here.compute_dtype), tokenizer_folder(folder)
    if yarn is not None:
        model.config = extend_window(model.config, yarn, original_window)
        model.set_rope(model.config.rope)
    tokenizer = load_tokenizer(tokenizer_from, model)
    sampling = Sampling(
        arguments.temperature, arguments.max_tokens, stop_tokens(tokenizer, model, tokenizer_from), arguments.seed,
        draw, arguments.top_k, arguments.top_p,
    )  # fmt: skip
    respondent = Respondent(
        model, tokenizer, sampling.stop_tokens, None, Grader(arguments.workers, thinking=not arguments.no_thinking),
        here, arguments.instruction, StopRequest(stopping), arguments.most_failed_share,
    )  # fmt: skip
    prompts = [respondent.prompt(problem, 1) for problem in problems]
    # a cache in which every row can be full, or what two thirds of the free memory hold: then rows wait
    window = max((len(prompt.tokens) for prompt in prompts), default=0) + arguments.max_tokens
    page = KERNEL_PAGE_TOKENS if here.device.type == "cuda" else window
    fits = here.free_memory_bytes() * 2 // 3 // cache_bytes_per_token(model.config, here.compute_dtype)
    tokens = arguments.cache_tokens or min((arguments.rows + 2) * window + page, fits)
    respondent.limits = CacheLimits(tokens, page, arguments.rows)
    check_requests(model, prompts, sampling, respondent.limits)
    return respondent, sampling, folder


def run_command(script: str, command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a command and leave the process with its status; what a person can put right ends in one sentence."""
    status: int | str = 0
    try:
        command(arguments)
    except (Interrupted, KeyboardInterrupt):
        status = 130
        if devices.speaks():
            print(f"stopped; the same command goes on, with what is in {arguments.out}")
    except Exception as error:
        status = devices.last_words(error, script, EXPECTED_ERRORS)
    finally:
        devices.stop()
    devices.leave(status)
