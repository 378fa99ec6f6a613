"""Shared by eval.py, data_filter.py and ask.py: loading a model to sample from, with its settings, and exiting."""

import argparse
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from engine import distributed
from engine.adapter import tokenizer_folder
from engine.distributed import Interrupted, StopRequest
from engine.fingerprint import function_identity, model_identity, prompts_identity
from engine.grader import Grader
from engine.huggingface import SETTINGS
from engine.rollout_worker import RolloutWorker
from engine.terminal import note
from engine.tokenizer import load_tokenizer, read_chat, stop_tokens
from lab.data_files import DataError
from lab.model_card import remembered
from lab.problems import INSTRUCTION, Problem
from lab.recipe import SamplerSettings
from model import extend_window, load, resolve_folder
from rollout import CacheLimits, Sampling, check_requests
from yarn import describe_ramp


def take_settings(arguments: argparse.Namespace, folder: Path, use: str) -> None:
    """Set what the command line leaves out: as the model's run has it for this use, else to the defaults.

    Where a curve sets the temperatures, the one of `arguments` stays None.
    """
    held = remembered(folder, use)
    default = {"n": 8, "temperature": 1.4, "top_k": 20 if use == "evaluation" else 0, "max_tokens": 8192}
    default |= {"instruction": INSTRUCTION, "thinking": "auto"}
    if getattr(arguments, "temperatures", None):
        del default["temperature"]
    missing = [name for name in default if getattr(arguments, name) is None]
    vars(arguments).update({name: held.get(name, default[name]) for name in missing})
    if taken := [f"{name} = {held[name]!r}" for name in missing if name in held]:
        note(f"from {folder / SETTINGS}: {', '.join(taken)}")
    if arguments.temperature == 0 and arguments.n > 1:
        raise DataError("at temperature 0 all responses to a problem are equal: use -n 1")


def load_worker(
    arguments: argparse.Namespace,
    sets: dict[str, list[Problem]] | None = None,
    stopping: str = "",
    use: str = "evaluation",
    draw: int = 0,
    yarn: dict | None = None,
) -> tuple[RolloutWorker, Sampling, dict[str, str]]:
    """Load a model to sample these data sets with lab.options.model_options; return worker, Sampling and identity.

    With --skip-bad-rows, problems that the window has no room for are removed from `sets`; without sets the worker has
    no cache and the model no identity. `stopping` is printed when a signal stops it; without, signals end the program.
    `use` is "evaluation" or "training"; `draw` is the step that keys the random draws; `yarn` has the arguments of
    model.extend_window. The caller closes the worker's grader. Raises ModelError, DataError or RolloutError for
    whatever would fail later.
    """
    processes, folder = distributed.start(), resolve_folder(arguments.model)
    take_settings(arguments, folder, use)
    grader = Grader(arguments.workers, reward=arguments.reward or "")  # tries the function out
    model, tokenizer_from = load(folder, processes.device, processes.compute_dtype), tokenizer_folder(folder)
    if yarn is not None:
        model.config = extend_window(model.config, **yarn)
        model.set_rope(model.config.rope)
        processes.say(describe_ramp(model.config.rope))
    thinking = {"true": True, "false": False}.get(arguments.thinking, arguments.thinking)
    chat = read_chat(load_tokenizer(tokenizer_from, model), thinking)
    processes.say(chat.account)
    grader.thinking = chat.thinking
    temperature = arguments.temperatures[0] if arguments.temperature is None else arguments.temperature  # of a curve
    sampling = Sampling(
        temperature, arguments.max_tokens, stop_tokens(chat, model, tokenizer_from), arguments.seed,
        draw, arguments.top_k, arguments.top_p,
    )  # fmt: skip
    stop = StopRequest(stopping) if stopping else None
    worker = RolloutWorker(
        model, chat, sampling.stop_tokens, None, grader, processes, arguments.instruction, stop,
        arguments.most_failed_share,
    )  # fmt: skip
    if sets is None:
        return worker, sampling, {}
    room, asked = model.config.max_position_embeddings - arguments.max_tokens, {}
    if arguments.skip_bad_rows and room > 0:
        for name, problems in sets.items():
            long = worker.too_long(problems, room, name)
            sets[name] = [problem for problem in problems if problem.id not in long]
            if not sets[name]:
                raise DataError(f"{name}: no prompt has {room} tokens or fewer; lower --max-tokens")
    prompts = worker.prompts(list(chain(*sets.values())), asked)
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
