"""The Run object: recipe, model, data and state, and the operations that every stage shares.

train.py has the recipe; a Run supplies its sampling settings, updates that fit in memory, the end of a step,
checkpoints and stopping. `engine.start` builds it.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.batches import TrainingSequence
from engine.checkpoint import CheckpointError, RunState, load_weights_and_optimizer, save_checkpoint
from engine.distributed import Interrupted, Processes, StopRequest, say_last
from engine.files import write_atomically
from engine.fingerprint import function_identity, model_identity, prompts_identity
from engine.memory import UpdateError
from engine.offload import HostAdamW
from engine.rollout_worker import RolloutWorker
from engine.run_folder import FINISHED, WANTS_RESUMING
from grpo import TokenLoss, UpdateStats, optimizer_step
from lab.console import SFT_LINES, console_header, console_line, format_eta, new_alarms
from lab.metrics import Metrics
from lab.model_card import settings_files, write_cards
from lab.problems import Problem
from lab.recipe import EvalSettings, FinalSettings, Recipe, RlStage, SftStage
from lab.run_data import RunData, by_ids, rl_source
from model import Transformer, save
from rollout import Sampling

EVALUATION_DRAW = -1  # the step from which evaluations draw; training steps are not negative


@dataclass
class Run:
    """Everything that the parts of a run share."""

    recipe: Recipe
    folder: Path
    processes: Processes
    model: Transformer
    model_folder: Path  # of the model that the run started from
    data: RunData
    worker: RolloutWorker
    metrics: Metrics
    state: RunState
    stop: StopRequest
    resume_from: Path | None  # checkpoint whose weights and optimizer the first stage to run loads
    lock: int | None  # on the folder, until this process ends; None except on the main process
    micro_batch_tokens: int  # the recipe's, until memory runs out; a resumed run starts with the recipe's again
    saved: tuple[int, int, bool] | None  # (step, stage, prepared) of the newest checkpoint
    optimizer: torch.optim.Optimizer | None = None  # of the current stage
    sft_sequences: dict[int, list[TrainingSequence]] = field(default_factory=dict)  # by stage
    stage_began: float = 0.0  # for the ETA: times at which this launch entered the stage and began its steps
    steps_began: float = 0.0
    stage_first_step: int = 0  # of the stage, in this launch
    nonfinite_batch: list[TrainingSequence] | None = None  # of the newest update without a finite gradient

    # ------------------------------------------------------------------------------------------ data and sampling

    def stage_problems(self, index: int) -> list[Problem]:
        """Return the problems of an rl stage: its own data, or the problems that the previous stage has kept."""
        source, state = rl_source(self.recipe, index), self.state
        problems = self.data.training_problems("rl", source)
        if index == state.stage and state.problem_ids and (state.prepared or not self.recipe.stage[index].data):
            problems = by_ids(problems, state.problem_ids, source)
        return problems

    def probe_problems(self) -> list[Problem]:
        """The problems on which diversity is measured before every stage."""
        sources = [stage.data for stage in self.recipe.stage if isinstance(stage, RlStage) and stage.data]
        problems = [problem for source in sources for problem in self.data.training_problems("rl", source)]
        return by_ids(problems, self.state.probe_ids, "the recipe's data")

    def sampling(self, stage: RlStage, temperature: float, draw: int) -> Sampling:
        """Training samples the policy itself: no top-k, no top-p, logits / temperature."""
        return Sampling(temperature, stage.max_response_tokens, self.worker.stop_tokens, self.recipe.seed, draw)

    def evaluation_sampling(self, settings: EvalSettings | FinalSettings) -> Sampling:
        """Evaluations use the top-k of their settings, and draws that training never uses."""
        return Sampling(
            temperature=settings.temperature,
            max_new_tokens=settings.max_response_tokens,
            stop_tokens=self.worker.stop_tokens,
            seed=self.recipe.seed,
            step=EVALUATION_DRAW,
            top_k=settings.top_k,
        )

    # ---------------------------------------------------------------------------------------------- steps of a stage

    def begin_steps(self, stage: SftStage | RlStage) -> None:
        """Make the stage's AdamW. A run that resumes within the stage loads its moments and the weights."""
        self.steps_began = time.perf_counter()
        self.state.metrics_position = list(self.metrics.position)  # a stop in the first step keeps the rows before it
        betas = (0.9, stage.adam_beta2)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        settings = {"lr": stage.learning_rate, "betas": betas, "weight_decay": stage.weight_decay}
        if self.recipe.offload_optimizer:
            self.optimizer = HostAdamW(trained, **settings)
        else:
            self.optimizer = torch.optim.AdamW(trained, **settings, fused=True)
        if self.resume_from is not None:
            load_weights_and_optimizer(self.resume_from, self.model, self.optimizer, self.processes)
            self.resume_from = None
            for group in self.optimizer.param_groups:  # the recipe's values override the checkpoint's
                group |= {"betas": betas, "weight_decay": stage.weight_decay}

    def update(
        self,
        sequences: list[TrainingSequence],
        loss: TokenLoss,
        stage: SftStage | RlStage,
        divisor: float | None = None,
        begun: bool = False,
        *,
        learning_rate: float,
    ) -> UpdateStats:
        """Make one optimizer step; micro-batches shrink when memory runs out, for the rest of the run.

        A request to stop abandons the update between two micro-batches, unless an earlier mini-batch has `begun` to
        change the weights. A resumed run repeats the step from its start, and overwrites the visits recorded before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        update = optimizer_step(
            self.model, self.optimizer, sequences, loss, self.micro_batch_tokens, stage.max_grad_norm, divisor,
            abandon=lambda: not begun and self.asked_to_stop(),
        )  # fmt: skip
        if not update.stepped:
            self.nonfinite_batch = sequences
        if update.micro_batch_tokens < self.micro_batch_tokens:
            self.processes.say(
                f"step {self.state.step + 1}: out of memory in the update: micro-batches of at most "
                f"{update.micro_batch_tokens:,} tokens from now on, not {self.micro_batch_tokens:,}"
            )
            self.micro_batch_tokens = update.micro_batch_tokens
        return update

    def record(self, index: int, row: dict) -> dict:
        """Add step and stage to a row, write it to metrics.jsonl and return it."""
        self._require_folder()
        row = {"kind": row["kind"], "step": self.state.step, "stage": index} | row
        self.metrics.write(row)
        return row

    def end_step(self, index: int, stage: SftStage | RlStage, row: dict) -> None:
        """Count the step and write its row; save a checkpoint when due; raise Interrupted after a request to stop."""
        state, settings = self.state, self.recipe.run
        state.step, state.stage_step = state.step + 1, state.stage_step + 1
        row = self.record(index, row)
        state.metrics_position = list(self.metrics.position)
        left = self.state.steps_left(stage)
        first = state.stage_step == self.stage_first_step + 1
        if first:
            self.processes.say(console_header(row))
        if row["kind"] == "rl" or first or not left or state.stage_step % SFT_LINES == 0:
            self.processes.say(console_line(row, sum(s.steps for s in self.recipe.stage), self.eta(index, stage)))
        for sentence in new_alarms(self.metrics.steps) if row["kind"] == "rl" else ():
            self.processes.say(f"warning: step {state.step}: {sentence}")
        if row["nonfinite"]:
            self.processes.say(f"warning: step {state.step}: a loss or gradient is not finite; its step was not taken")
        if not row.get("skipped"):
            state.nonfinite_steps = (state.nonfinite_steps + 1) * row["nonfinite"]
        if row["nonfinite"] and state.nonfinite_steps >= settings.most_nonfinite_steps:
            self._stop_at_nonfinite()
        if self.asked_to_stop():
            raise Interrupted
        if left == 0 or state.stage_step % settings.checkpoint_every_steps == 0:
            self.save()

    def eta(self, index: int, stage: SftStage | RlStage) -> str:
        """Return the time until the run's last step, of which a batch takes as long as in this stage, by its size.

        Before the first rl stage only the steps of fine-tuning can be estimated: "> 2m 05s".
        """

        def batch(stage: SftStage | RlStage) -> int:
            return stage.batch_problems * stage.group_size if isinstance(stage, RlStage) else stage.batch_sequences

        now, done = time.perf_counter(), self.state.stage_step - self.stage_first_step
        later = [other for other in self.recipe.stage[index + 1 :] if type(other) is type(stage)]
        steps = self.state.steps_left(stage) + sum(other.steps * batch(other) / batch(stage) for other in later)
        seconds = (now - self.steps_began) / done * steps + (self.steps_began - self.stage_began) * len(later)
        return "> " * (len(later) < len(self.recipe.stage) - index - 1) + format_eta(seconds)

    def _stop_at_nonfinite(self) -> None:
        """Save the newest batch and a checkpoint, whose weights are those before these steps; raise UpdateError."""
        state, path = self.state, self.folder / f"nonfinite-step-{self.state.step}.pt"
        steps, state.nonfinite_steps = state.nonfinite_steps, 0  # a resumed run counts from 0
        if self.processes.is_main:
            rows = [vars(sequence) for sequence in self.nonfinite_batch]
            torch.save(
                [{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in r.items()} for r in rows], path
            )
        self.save()
        raise UpdateError(
            f"step {state.step}: {steps} consecutive updates without a finite gradient (run.most_nonfinite_steps): the "
            f"batch is in {path} (tokens, advantages, old log-probs); lower the learning rate or fix the data, then "
            f"resume: {self.resume_command()}"
        )

    # ----------------------------------------------------------------------------------------------- saving, stopping

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop. Every process calls it, so that all stop at the same place."""
        return any(self.processes.all_gather(self.stop.asked))

    def save(self) -> None:
        """Save a checkpoint of the last complete step, unless it exists or no stage has begun its steps."""
        position = self.state.step, self.state.stage, self.state.prepared
        if self.optimizer is None or self.saved == position:
            return
        self._require_folder()
        self.metrics.sync()
        kept = self.recipe.run.checkpoints_kept
        save_checkpoint(self.folder, self.model, self.optimizer, self.state, self.processes, kept)
        self.saved = position

    def _require_folder(self) -> None:
        """Raise CheckpointError if the run's folder is no longer in its place: nothing could be resumed from it."""
        if self.lock is None:
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self.lock), os.stat(self.folder)) and (self.folder / "recipe.toml").exists():
                return
        raise CheckpointError(
            f"{self.folder} was deleted, moved or replaced during the run, which stops after step {self.state.step}: "
            "restore the folder to resume it, or start again"
        )

    def export_model(self, index: int) -> None:
        """Write the model after stage INDEX as a Hugging Face folder, stage-INDEX."""
        export = self.folder / f"stage-{index}"
        if self.processes.is_main and export.exists() and self.state.stage_step > self.stage_first_step:
            # it includes steps after the checkpoint that this launch resumed from: `save` removes it
            export.rename(export.with_name(f"{export.name}.unfinished"))
            (self.folder / f"pass-rates-{index + 1}.jsonl").unlink(missing_ok=True)  # of those weights
        if not self.processes.broadcast(export.exists()):
            stops = self.worker.stop_tokens
            settings = settings_files(self.recipe, index, self.state.temperature, stops, self.model_folder)
            save(self.model, export, self.processes.compute_dtype, self.model_folder, settings)
            if self.processes.is_main:
                write_cards(self.folder)

    def identity(self, index: int, problems: list[Problem]) -> dict[str, str]:
        """Return the identity of the model that stage INDEX starts from, and of its prompts."""
        folder = self.folder / f"stage-{index - 1}" if index else self.model_folder
        found = self.processes.broadcast(model_identity(folder) if self.processes.is_main else None)
        found |= {"reward function": function_identity(self.recipe.reward.function)}
        return found | {"prompts": prompts_identity(self.worker.prompt(problem, 1) for problem in problems)}

    def resume_command(self) -> str:
        """Return the command that resumes the run."""
        return f"torchrun train.py --resume {self.folder}"

    def mark_finished(self) -> None:
        """Write a file that says that the run has finished."""
        if self.processes.is_main:
            write_cards(self.folder)  # with the last evaluation
            write_atomically(self.folder / FINISHED, [f"after step {self.state.step}\n".encode()])

    def mark_stopped(self) -> None:
        """Print the command that resumes the run, and write it to a file: torchrun hides its workers' exit codes."""
        if self.processes.is_main:
            write_atomically(self.folder / WANTS_RESUMING, [f"{self.resume_command()}\n".encode()])
            say_last(f"stopped after step {self.state.step}; resume with: {self.resume_command()}")

    def close(self) -> None:
        """Stop the grader, send what a tracker still has, and release the folder."""
        self.worker.grader.close()
        self.metrics.close()
        if self.lock is not None:
            os.close(self.lock)
