"""TRL's PPOTrainer on ppomax's engine: the same models, data set, callbacks and PPOConfig; `train`, `save_model`,
`generate_completions`, and what TRL's had not: rewards by a function, and a run that goes on where it stopped."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, ProgressCallback

from ppomax.config import ConfigError
from ppomax.data import encode_prompt
from ppomax.engine import Engine
from ppomax.integrations.trl.config import train_config
from ppomax.models import Critic
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import newest, prune
from ppomax.saving.random_state import seed_all
from ppomax.sharding import ranks
from ppomax.stages.order import Order

log = logging.getLogger(__name__)


class PPOTrainer:
    """Train `model` by PPO as `args` says, TRL's PPOConfig or ppomax's.

    model, ref_model (None: `model` as it is now), reward_model and value_model (None: a copy of the reward model):
    HF models or paths; reward_model may be f(prompts: list[str], responses: list[str]) -> one number each, value_model
    then is a new head on the policy. train_dataset: rows with `input_ids`, or with `prompt` (text or chat).
    peft_config: a LoraConfig. data_collator: nothing is padded, so none is needed; DataCollatorWithPadding is let pass.
    ConfigError names what cannot be served. COMING_FROM_TRL.md says what is otherwise than in TRL."""

    def __init__(
        self,
        args: Any,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | str,
        ref_model: PreTrainedModel | str | None,
        reward_model: PreTrainedModel | str | Callable[..., Any],
        train_dataset: Any,
        value_model: PreTrainedModel | str | None = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        if any(x is not None for x in optimizers):
            raise ConfigError("PPOTrainer: optimizers is not served; both models are trained by AdamW as args says")
        if data_collator is not None and not isinstance(data_collator, DataCollatorWithPadding):
            raise ConfigError("PPOTrainer: data_collator is not served; rows are read as they are, nothing is padded")
        self.args, self.processing_class = args, processing_class
        ranks.start("cpu" if args.use_cpu else "auto")
        seed_all(args.seed)
        self.prompts = self._ids(train_dataset)
        self.eval_prompts = None if eval_dataset is None else self._ids(eval_dataset)
        by_function = callable(reward_model) and not isinstance(reward_model, PreTrainedModel)
        self.config = train_config(
            args,
            rows=len(self.prompts),
            ranks=ranks.world_size(),
            longest_prompt=max(map(len, self.prompts)),
            lora=peft_config,
            critic="policy" if by_function else "reward_model",
        )
        critic: Any = None if value_model is reward_model else value_model
        self.engine = Engine(
            model,
            ref_model,
            Critic(critic) if isinstance(critic, PreTrainedModel) else critic,
            reward_model,
            self.config,
            tokenizer=processing_class,
        )
        if args.stop_token_id is not None:
            self.engine.eos_ids = [args.stop_token_id]
        self.model = self.engine.policy.module
        self.order, self.drawn = Order(len(self.prompts), args.seed), 0
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = self.state.is_local_process_zero = ranks.rank() == 0
        progress: Any = PrinterCallback if args.disable_tqdm else ProgressCallback
        reporting = get_reporting_integration_callbacks(args.report_to)
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *reporting, *(callbacks or []), progress],
            self.model,
            processing_class,
            self.engine.policy.optimizer if hasattr(self.engine.policy, "optimizer") else None,
            None,
        )
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)

    def add_callback(self, callback: Any) -> None:
        """One more TrainerCallback, or its class."""
        self.callback_handler.add_callback(callback)

    def train(self, resume_from_checkpoint: bool = False) -> None:
        """All steps that args asks for; with `resume_from_checkpoint` those that are left after the newest whole
        checkpoint under args.output_dir, to the bit as if it had never stopped."""
        args, state, run = self.args, self.state, self.config.run
        states = Path(args.output_dir) / "engine"
        state.max_steps, state.global_step = run.steps, 0
        epochs = run.steps * self.config.batch.rollout_size / len(self.prompts)
        state.num_train_epochs = epochs  # type: ignore[assignment]
        state.logging_steps, state.save_steps = (
            _every(args.logging_steps, run.steps),
            _every(args.save_steps, run.steps),
        )
        found = newest(states) if resume_from_checkpoint else None
        if found is not None:
            extra = self.engine.restore(found, verified=True)
            state.global_step, self.drawn, state.log_history = extra["step"], extra["drawn"], extra["log_history"]
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        every = max(1, run.steps // args.num_sample_generations) if args.num_sample_generations else 0
        while state.global_step < run.steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(args, state, self.control)
            metrics, _ = self.engine.step(self._next())
            state.global_step += 1
            state.epoch = self.drawn / len(self.prompts)
            self.control = self.callback_handler.on_step_end(args, state, self.control)
            if self.control.should_log or args.logging_steps == 1:
                self.log(metrics)
            if self.control.should_save:
                self._save(states)
            if every and self.eval_prompts and (state.global_step - 1) % every == 0:
                self.generate_completions()
        self.control = self.callback_handler.on_train_end(args, state, self.control)

    def log(self, metrics: Mapping[str, float]) -> None:
        """A row for `state.log_history` and the callbacks; the names are TRL's."""
        row = {**metrics, "epoch": round(self.state.epoch or 0.0, 4)}
        self.state.log_history.append({**row, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)

    def save_model(self, output_dir: str | None = None) -> None:
        """The policy and its tokenizer as a HF folder, adapters merged in and beside it; None: args.output_dir. A
        folder of that name is replaced, but args.output_dir keeps what else lies in it."""
        own = Path(self.args.output_dir)
        folder = Path(output_dir or own)
        if folder.resolve() != own.resolve():
            export_policy(self.engine, folder)
            return
        part = export_policy(self.engine, own / "policy")
        with ranks.fail_together():
            if ranks.rank() == 0:
                for file in part.iterdir():
                    shutil.rmtree(own / file.name, ignore_errors=True)
                    os.replace(file, own / file.name)
                part.rmdir()

    def generate_completions(self, sampling: bool = False) -> None:
        """Print a table of responses to prompts of eval_dataset, with their scores; with `sampling` the first batch is
        answered, else all."""
        if self.eval_prompts is None:
            return
        count = self.args.per_device_eval_batch_size if sampling else len(self.eval_prompts)
        roll, scores = self.engine.preview(self.eval_prompts[:count])
        if ranks.rank():
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("query", "model response", "score", show_lines=True)
        for pair, score in list(zip(roll.sequences(), scores.tolist(), strict=True))[:5]:
            texts = [str(self.processing_class.decode(ids, skip_special_tokens=True)) for ids in pair]
            table.add_row(*texts, f"{score:.3f}")
        Console().print(table)

    def _ids(self, dataset: Any) -> list[list[int]]:
        rows = list(dataset)
        if not rows:
            raise ConfigError("PPOTrainer: the data set has no rows")
        if "input_ids" in rows[0]:
            return [[int(t) for t in row["input_ids"]] for row in rows]
        if "prompt" in rows[0]:
            return [encode_prompt(row["prompt"], self.processing_class) for row in rows]
        raise ConfigError(f"PPOTrainer: rows need `input_ids` or `prompt`, these have {', '.join(rows[0])}")

    def _next(self) -> list[list[int]]:
        size = self.config.batch.rollout_size
        taken = self.order.take(self.drawn, size)
        self.drawn += size
        return [self.prompts[i] for i in taken]

    def _save(self, states: Path) -> None:
        """The policy as TRL lays it down, and what a run needs to go on."""
        step, keep = self.state.global_step, self.config.run.keep_checkpoints
        extra = {"step": step, "drawn": self.drawn, "log_history": self.state.log_history}
        self.engine.save(states / f"step-{step:06d}", extra)
        export_policy(self.engine, Path(self.args.output_dir) / f"checkpoint-{step}")
        prune(states, keep)
        if ranks.rank() == 0:
            kept = {int(p.name.removeprefix("step-")) for p in states.glob("step-*")}
            for old in Path(self.args.output_dir).glob("checkpoint-*"):
                if old.name.removeprefix("checkpoint-").isdigit() and int(old.name[11:]) not in kept:
                    shutil.rmtree(old)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)


def _every(steps: float, total: int) -> int:
    """transformers takes a share of all steps too."""
    return max(1, round(steps * total)) if 0 < steps < 1 else int(steps)
