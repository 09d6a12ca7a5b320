"""transformers' Trainer around a student and its frozen templates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from cmc_server.errors import ConfigError, one_line
from cmc_server.training.batches import Collator, TrainingSet
from cmc_server.training.objectives import Objective
from cmc_server.training.recipes import Recipe
from cmc_server.training.student import DIVERGED, Student
from cmc_server.training.terms import Answers

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

LOGGING_STEPS = 5
_WEIGHTS = "model.safetensors"


class DeltaTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the recipe's objective over the steered logits.

    Args:
        student: the delta in float32.
        collator: puts items side by side; knows the frozen LLMs.
        recipe: objective, optimisation and seed.
        train: items to learn.
        heldout: items to measure the loss on after every epoch.
        folder: working folder of the Trainer, for its checkpoints.

    Raises:
        ConfigError: this machine cannot do the recipe's mixed precision.
    """

    def __init__(
        self,
        student: Student,
        collator: Collator,
        recipe: Recipe,
        train: TrainingSet,
        heldout: TrainingSet | None,
        folder: Path,
    ) -> None:
        super().__init__(
            model=student,
            args=_arguments(recipe, len(train), str(folder), evaluate=heldout is not None),
            train_dataset=train,
            eval_dataset=heldout,
            data_collator=collator,
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress)
        self.add_callback(_Epochs(train))
        self._collator = collator
        self._objective: Objective = recipe.objective
        self._terms: dict[str, list[Tensor]] = defaultdict(list)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The objective on one batch, averaged over the templates.

        The mean over templates, rather than one template a batch in turn: the delta's forward pass serves all of them,
        the gradient is that of the stated loss without the noise of turns, and no step depends on its number.

        Raises:
            ConfigError: the loss of a training batch is not finite.
        """
        loss, means = batch_loss(model(inputs), self._collator, self._objective, inputs)
        if model.training:
            if not bool(loss.isfinite()):  # no weight comes back from that
                step = self.state.global_step + 1
                raise ConfigError(DIVERGED.format(f"lost its way at step {step}, where the loss is {loss.item()}"))
            for term, value in means.items():
                self._terms[term].append(value.detach())
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: the logits of a whole file would not fit into memory."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with the mean of each term since the last one, where the loss has several."""
        if "loss" in logs:
            terms = {term: torch.stack(values).mean().item() for term, values in self._terms.items()}
            self._terms.clear()
            logs = logs | (terms if len(terms) > 1 else {})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        # Trainer's own refuses weights that are tied; the parameters name each of them once.
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(self.model.named_parameters()) if state_dict is None else state_dict
        save_file({name: tensor.detach().cpu() for name, tensor in weights.items()}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _readable(resume_from_checkpoint), torch.no_grad():
            weights = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Says what to do where a file of a checkpoint is broken."""
    try:
        yield
    except Exception as error:  # torch, pickle, zipfile and safetensors all have their own
        raise ConfigError(
            f"The checkpoint {checkpoint} cannot be read ({one_line(error)[:200]}); begin again with --restart."
        ) from error


def batch_loss(
    delta_logits: Mapping[str, Tensor], collator: Collator, objective: Objective, batch: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective on one batch: the scalar and the mean of each term, both averaged over the templates."""
    results = [objective.loss(answers) for answers in answers_by_template(delta_logits, collator, batch)]
    means = {term: torch.stack([means[term] for _, means in results]).mean() for term in results[0][1]}
    return torch.stack([loss for loss, _ in results]).mean(), means


def answers_by_template(
    delta_logits: Mapping[str, Tensor], collator: Collator, batch: Mapping[str, Any]
) -> Iterator[dict[str, Answers]]:
    """What the models say, by role, beside one template after the other.

    Args:
        delta_logits: [P, D] for each role, as :class:`~cmc_server.training.student.Student` returns them.
        collator: that made the batch.
        batch: on the models' device.
    """
    for k, template in enumerate(collator.templates):
        answers = {}
        bridge = collator.bridges.get(k)
        delta_ids = None if bridge is None else bridge.delta_ids.to(template.model.device)
        for role, part in batch.items():
            reading, logits = part["readings"][k], delta_logits[role]
            answers[role] = Answers(
                template_logits=None if template.silent else template.logits(reading["hidden"]),
                delta_logits=logits.index_select(0, reading["picks"]) if "picks" in reading else logits,
                labels=reading["labels"],
                rows=reading["rows"],
                tuned_logits=None if collator.tuned is None else collator.tuned.logits(reading["tuned"]),
                delta_ids=delta_ids,
            )
        yield answers


@torch.no_grad()
def measure_losses(
    student: Student, collator: Collator, objective: Objective, items: TrainingSet
) -> dict[str, tuple[float, float]]:
    """Mean of each term over all tokens or answers of a set, with the delta and without it, rounded for the record.

    Returns:
        By term, and by ``loss``: their weighted sum.
    """
    aim = objective.measured()
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    counts: dict[str, int] = defaultdict(int)
    for index in range(len(items)):
        batch = send_to_device(collator([items[index]]), collator.templates[0].model.device)
        delta_logits = student(batch)
        without = {role: torch.zeros_like(logits) for role, logits in delta_logits.items()}
        for column, logits in enumerate((delta_logits, without)):
            for answers in answers_by_template(logits, collator, batch):
                for term, values in aim.terms(answers).items():
                    sums[term][column] += values.double().sum().cpu()
                    counts[term] += values.numel() if column == 0 else 0
    means = {term: total / counts[term] for term, total in sums.items()}
    means["loss"] = torch.stack([aim.weight(term) * mean for term, mean in means.items()]).sum(0)
    return {term: (round(float(both[0]), 4), round(float(both[1]), 4)) for term, both in means.items()}


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the training set its epoch; the data loader of an epoch that is resumed midway does not."""

    def __init__(self, train: TrainingSet) -> None:
        self._train = train

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._train.set_epoch(int(state.epoch or 0))


class _Progress(ProgressCallback):  # type: ignore[misc]
    """The bar on stderr with the losses beside it; Trainer's own writes its logs to stdout."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        shown = {key: f"{logs[key]:.3f}" for key in ("loss", "forget", "retain", "eval_loss") if key in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


def _arguments(recipe: Recipe, num_items: int, folder: str, *, evaluate: bool) -> TrainingArguments:
    settings, checkpoint = recipe.optimisation, recipe.checkpoint
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("optimisation.mixed_precision: fp16 needs a GPU; choose bf16 or no.")
    micro_batches = -(-num_items // (settings.batch_size * PartialState().num_processes))
    steps = -(-micro_batches // settings.gradient_accumulation_steps) * settings.epochs
    try:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=round(settings.warmup_share * steps),
            lr_scheduler_type=settings.lr_scheduler_type,
            max_grad_norm=settings.max_grad_norm,
            use_cpu=PartialState().device.type == "cpu",  # said aloud, for bf16 on it
            bf16=settings.mixed_precision == "bf16",
            fp16=settings.mixed_precision == "fp16",
            seed=recipe.seed,
            logging_steps=LOGGING_STEPS,
            eval_strategy="epoch" if evaluate else "no",
            save_strategy=checkpoint.save_strategy,
            save_steps=checkpoint.save_steps,
            save_total_limit=checkpoint.save_total_limit,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )
    except ValueError as error:
        raise ConfigError(f"The recipe's optimisation does not run here: {one_line(error)}") from None
    # One process drives one device; torch's DataParallel would cut the packed positions of a batch anywhere.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
