"""What eval.py and data_filter.py share as commands: a model that answers, and an end that says why."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from engine import distributed
from engine.distributed import Interrupted, StopRequest
from engine.grader import Grader
from engine.rollout_worker import RolloutWorker
from engine.tokenizer import load_tokenizer, stop_tokens
from lab.problems import Problem
from model import extend_window, load, resolve_folder, tokenizer_folder
from rollout import KERNEL_PAGE_TOKENS, CacheLimits, Sampling, cache_bytes_per_token, check_requests


def load_worker(
    arguments: argparse.Namespace,
    problems: Sequence[Problem],
    stopping: str,
    draw: int = 0,
    yarn: float | None = None,
    original_window: int | None = None,
) -> tuple[RolloutWorker, Sampling, Path]:
    """A model loaded to answer these problems as a command line says (lab.options.model_options), and its folder.

    `stopping` is what is said when a signal stops it; `draw` is the step that samples are counted from. The caller
    closes its grader. Raises ModelError, DataError or RolloutError for what would go wrong later.
    """
    here, folder = distributed.start(), resolve_folder(arguments.model)
    model, tokenizer_from = load(folder, here.device, here.compute_dtype), tokenizer_folder(folder)
    if yarn is not None:
        model.config = extend_window(model.config, yarn, original_window)
        model.set_rope(model.config.rope)
    tokenizer = load_tokenizer(tokenizer_from, model)
    sampling = Sampling(
        arguments.temperature, arguments.max_tokens, stop_tokens(tokenizer, model, tokenizer_from), arguments.seed,
        draw, arguments.top_k, arguments.top_p,
    )  # fmt: skip
    worker = RolloutWorker(
        model, tokenizer, sampling.stop_tokens, None, Grader(arguments.workers, thinking=not arguments.no_thinking),
        here, arguments.instruction, StopRequest(stopping), arguments.most_failed_share,
    )  # fmt: skip
    prompts = [worker.prompt(problem, 1) for problem in problems]
    # a cache in which every row can be full, or what two thirds of the free memory hold: then rows wait
    window = max((len(prompt.tokens) for prompt in prompts), default=0) + arguments.max_tokens
    page = KERNEL_PAGE_TOKENS if here.device.type == "cuda" else window
    fits = here.free_memory_bytes() * 2 // 3 // cache_bytes_per_token(model.config, here.compute_dtype)
    tokens = arguments.cache_tokens or min((arguments.rows + 2) * window + page, fits)
    worker.limits = CacheLimits(tokens, page, arguments.rows)
    check_requests(model, prompts, sampling, worker.limits)
    return worker, sampling, folder


def run_command(script: str, command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a command and leave the process with its status; what a person can put right ends in one sentence."""
    status: int | str = 0
    try:
        command(arguments)
    except (Interrupted, KeyboardInterrupt):
        status = 130
        if distributed.is_main_process():
            print(f"stopped; the same command goes on, with what is in {arguments.out}")
    except Exception as error:
        status = distributed.report_error(error, script)
    finally:
        distributed.stop()
    distributed.exit_process(status)
