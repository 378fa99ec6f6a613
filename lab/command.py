"""Shared by the commands of eval.py and data_filter.py: loading a model to sample from, and exiting."""

import argparse
from collections.abc import Callable, Sequence

from engine import distributed
from engine.adapter import tokenizer_folder
from engine.distributed import Interrupted, StopRequest
from engine.fingerprint import function_identity, model_identity, prompts_identity
from engine.grader import Grader
from engine.rollout_worker import RolloutWorker
from engine.tokenizer import load_tokenizer, read_chat, stop_tokens
from lab.problems import Problem
from lab.recipe import SamplerSettings
from model import extend_window, load, resolve_folder
from rollout import CacheLimits, Sampling, check_requests
from yarn import describe_ramp


def load_worker(
    arguments: argparse.Namespace,
    problems: Sequence[Problem],
    stopping: str,
    draw: int = 0,
    yarn: dict | None = None,
) -> tuple[RolloutWorker, Sampling, dict[str, str]]:
    """Load a model to sample these problems with lab.options.model_options; return worker, Sampling and identity.

    `stopping` is printed when a signal stops it; `draw` is the step that keys the random draws; `yarn` has the
    arguments of model.extend_window. The caller closes the worker's grader. Raises ModelError, DataError or
    RolloutError for whatever would fail later.
    """
    processes, folder = distributed.start(), resolve_folder(arguments.model)
    grader = Grader(arguments.workers, reward=arguments.reward or "")  # tries the function out
    model, tokenizer_from = load(folder, processes.device, processes.compute_dtype), tokenizer_folder(folder)
    if yarn is not None:
        model.config = extend_window(model.config, **yarn)
        model.set_rope(model.config.rope)
        processes.say(describe_ramp(model.config.rope))
    thinking = {"true": True, "false": False}.get(arguments.thinking, "auto")
    chat = read_chat(load_tokenizer(tokenizer_from, model), thinking)
    processes.say(chat.account)
    grader.thinking = chat.thinking
    sampling = Sampling(
        arguments.temperature, arguments.max_tokens, stop_tokens(chat, model, tokenizer_from), arguments.seed,
        draw, arguments.top_k, arguments.top_p,
    )  # fmt: skip
    worker = RolloutWorker(
        model, chat, sampling.stop_tokens, None, grader, processes, arguments.instruction, StopRequest(stopping),
        arguments.most_failed_share,
    )  # fmt: skip
    asked: dict = {}
    prompts = worker.prompts(problems, asked)
    worker.check(asked)
    window = max((len(prompt.tokens) for prompt in prompts), default=0) + arguments.max_tokens
    page = SamplerSettings.page_tokens if processes.device.type == "cuda" else window
    worker.limits = CacheLimits(arguments.cache_tokens or 0, page, arguments.rows)
    check_requests(model, prompts, sampling, worker.limits)
    identity = processes.broadcast(model_identity(folder) if processes.is_main else None)
    identity |= {"prompts": prompts_identity(prompts), "reward function": function_identity(arguments.reward or "")}
    return worker, sampling, identity


def run_command(script: str, command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a command and exit with its status; a UserError becomes one sentence."""
    status: int | str = 0
    try:
        command(arguments)
    except Interrupted:
        status = distributed.stop_status()
        if distributed.is_main_process():
            distributed.say_last(f"stopped; the same command resumes from {arguments.out}")
    except Exception as error:
        status = distributed.report_error(error, script)
    finally:
        distributed.stop()
    distributed.exit_process(status)
