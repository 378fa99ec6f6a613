"""A run under way: recipe, model, data and state, and what every stage does with them.

train.py is the recipe; this is what carries it through: sampling settings, updates within the memory there is, the end
of a step, checkpoints, stopping in order. `engine.start` makes a Run.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
import torch

from engine.batches import TrainingSequence
from engine.checkpoint import RunState, load_weights_and_optimizer, save_checkpoint
from engine.distributed import Interrupted, Processes, StopRequest
from engine.memory import UpdateError
from engine.offload import HostAdamW
from engine.rollout_worker import RolloutWorker
from grpo import TokenLoss, UpdateStats, optimizer_step
from lab.alarms import new_alarms
from lab.console import console_line
from lab.metrics import Metrics
from lab.problems import Problem
from lab.recipe import EvalSettings, FinalSettings, Recipe, RlStage, SftStage
from lab.run_data import RunData, by_ids
from model import Transformer
from rollout import Sampling

EVALUATION_DRAW = -1  # evaluations draw from a place that no training step counts from


@dataclass
class Run:
    """What all parts of a run need."""

    recipe: Recipe
    folder: Path
    processes: Processes
    model: Transformer
    model_folder: Path  # the model that the run began with
    data: RunData
    worker: RolloutWorker
    metrics: Metrics
    state: RunState
    stop: StopRequest
    resume_from: Path | None  # a checkpoint whose weights and optimizer the first stage to run loads
    lock: int | None  # the folder, held as long as this process lives; None in all processes but the main one
    micro_batch_tokens: int  # the recipe's, until memory runs out; a resumed run tries the recipe's again
    saved: tuple[int, int, bool] | None  # step, stage, prepared: of the newest checkpoint
    optimizer: torch.optim.Optimizer | None = None  # of the stage whose steps are under way
    sft_sequences: dict[int, list[TrainingSequence]] = field(default_factory=dict)  # by stage
    stage_began: float = 0.0  # for the ETA: when, and at which of its steps, the stage began in this launch
    stage_first_step: int = 0
    nonfinite_batch: list[TrainingSequence] | None = None  # of the newest update without a finite gradient

    # ------------------------------------------------------------------------------------------ data and sampling

    def stage_problems(self, index: int) -> list[Problem]:
        """The rl stage's own data, or what the stage before has left of its data."""
        source, state = self.data.rl_source(index), self.state
        problems = self.data.training_problems("rl", source)
        if index == state.stage and state.problem_ids and (state.prepared or not self.recipe.stage[index].data):
            problems = by_ids(problems, state.problem_ids, source)
        return problems

    def sampling(self, stage: RlStage, temperature: float, draw: int) -> Sampling:
        """Training samples the policy itself: no top-k, no top-p, logits / temperature."""
        return Sampling(temperature, stage.max_response_tokens, self.worker.stop_tokens, self.recipe.seed, draw)

    def evaluation_sampling(self, settings: EvalSettings | FinalSettings) -> Sampling:
        """Evaluations have a top-k of their own, and draws that training never uses."""
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
        """A new AdamW for the stage; where the run resumes inside it, with the moments (and weights) it had."""
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
            for group in self.optimizer.param_groups:  # the recipe's values count, not the checkpoint's
                group |= {"betas": betas, "weight_decay": stage.weight_decay}

    def steps_left(self, stage: SftStage | RlStage) -> int:
        """Steps until the stage ends, by number or, at the length of its rollouts so far, by their tokens."""
        state = self.state
        left = stage.steps - state.stage_step
        if isinstance(stage, RlStage) and stage.generated_tokens and state.stage_tokens:
            tokens_left = max(0, stage.generated_tokens - state.stage_tokens)
            left = min(left, ceil(tokens_left * state.stage_step / state.stage_tokens))
        return max(0, left)

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
        """One optimizer step; micro-batches that memory has made smaller stay so for the rest of the run.

        A step whose update was abandoned, between two micro-batches, is done again whole: its visits replace themselves.
        One whose weights have `begun` to change, by an earlier mini-batch, is not abandoned.
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

    def record(self, index: int, row: dict) -> None:
        """Write a row of the stage into metrics.jsonl."""
        self.metrics.write({"kind": row["kind"], "step": self.state.step, "stage": index} | row)

    def end_step(self, index: int, stage: SftStage | RlStage, row: dict) -> None:
        """Count the step, write its row, save where the recipe says so, stop when asked."""
        state, settings = self.state, self.recipe.run
        state.step, state.stage_step = state.step + 1, state.stage_step + 1
        row = {"kind": row["kind"], "step": state.step, "stage": index} | row
        self.metrics.write(row)
        state.metrics_position = list(self.metrics.position)
        left = self.steps_left(stage)
        per_step = (time.perf_counter() - self.stage_began) / (state.stage_step - self.stage_first_step)
        self.processes.say(console_line(row, sum(s.steps for s in self.recipe.stage), per_step * left))
        for sentence in new_alarms(self.metrics.steps) if row["kind"] == "rl" else ():
            self.processes.say(f"warning: step {state.step}: {sentence}")
        if row["nonfinite"]:
            self.processes.say(
                f"warning: step {state.step}: the gradient is not finite; the weights were left as they are"
            )
        if not row.get("skipped"):
            state.nonfinite_steps = (state.nonfinite_steps + 1) * row["nonfinite"]
        if row["nonfinite"] and state.nonfinite_steps >= settings.most_nonfinite_steps:
            self._stop_at_nonfinite()
        if self.asked_to_stop():
            raise Interrupted
        if left == 0 or state.stage_step % settings.checkpoint_every_steps == 0:
            self.save()

    def _stop_at_nonfinite(self) -> None:
        """Leave the newest batch where a person can look at it; the weights are those before the first of these steps."""
        state, path = self.state, self.folder / f"nonfinite-step-{self.state.step}.pt"
        steps, state.nonfinite_steps = state.nonfinite_steps, 0  # a resumed run, perhaps with another rate, tries again
        if self.processes.is_main:
            rows = [asdict(sequence) for sequence in self.nonfinite_batch]
            torch.save(
                [{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in r.items()} for r in rows], path
            )
        self.save()
        raise UpdateError(
            f"step {state.step}: {steps} updates in a row without a finite gradient (run.most_nonfinite_steps): the "
            f"batch is in {path} (tokens, advantages, old log-probs); lower the learning rate or fix the data, then "
            f"{self.how_to_go_on()}"
        )

    # ----------------------------------------------------------------------------------------------- saving, stopping

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop. Every process calls it, and all leave at the same place."""
        return any(self.processes.all_gather(self.stop.asked))

    def save(self) -> None:
        """A checkpoint of the last whole step, unless there is one already or no stage is under way."""
        place = self.state.step, self.state.stage, self.state.prepared
        if self.optimizer is None or self.saved == place:
            return
        self.metrics.sync()
        kept = self.recipe.run.checkpoints_kept
        save_checkpoint(self.folder, self.model, self.optimizer, self.state, self.processes, kept)
        self.saved = place

    def how_to_go_on(self) -> str:
        """The command for a person."""
        return f"torchrun train.py --resume {self.folder}"

    def leave_marker(self, name: str, text: str) -> None:
        """Say in the run's folder how it ended: torchrun hides the exit code of its workers."""
        if self.processes.is_main:
            (self.folder / name).write_text(f"{text}\n")

    def close(self) -> None:
        """Let go of grader and folder."""
        self.worker.grader.close()
        if self.lock is not None:
            os.close(self.lock)
