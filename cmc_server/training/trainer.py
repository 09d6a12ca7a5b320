"""transformers' Trainer around a student and a frozen template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainingArguments

from cmc_server.training.data import Example, collate
from cmc_server.training.objectives import OBJECTIVES
from cmc_server.training.recipes import Recipe
from cmc_server.training.student import Student
from cmc_server.training.template import FrozenTemplate

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

LOGGING_STEPS = 5


class DeltaTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the recipe's objective over the steered logits.

    Args:
        student: the delta in float32.
        template: the frozen template LLM.
        recipe: objective, optimisation and seed.
        train: examples to learn.
        heldout: examples to measure the loss on after every epoch.
        folder: working folder of the Trainer, which insists on one.
    """

    def __init__(
        self,
        student: Student,
        template: FrozenTemplate,
        recipe: Recipe,
        train: Sequence[Example],
        heldout: Sequence[Example] | None,
        folder: Path,
    ) -> None:
        super().__init__(
            model=student,
            args=_arguments(recipe, len(train), str(folder), evaluate=heldout is not None),
            train_dataset=train,
            eval_dataset=heldout,
            data_collator=collate,
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress)
        self._template = template
        self._objective = OBJECTIVES[recipe.objective.name]
        self._template_weight = recipe.objective.template_weight

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """The objective on one batch of :func:`~cmc_server.training.data.collate`."""
        delta_logits = model(inputs["input_ids"], inputs["attention_mask"], inputs["positions"])
        loss = self._objective(
            self._template.logits(inputs["hidden"]), delta_logits, inputs["labels"], self._template_weight
        )
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: the logits of a whole file would not fit into memory."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


@torch.no_grad()
def measure_losses(
    student: Student, template: FrozenTemplate, recipe: Recipe, examples: Sequence[Example]
) -> tuple[float, float]:
    """Mean objective per response token, with the delta and without it, rounded for the record.

    The pull towards the template is left out: it belongs to the way, not to the aim.
    """
    objective = OBJECTIVES[recipe.objective.name]
    sums, count = torch.zeros(2), 0
    for example in examples:
        batch = {name: tensor.to(template.model.device) for name, tensor in collate([example]).items()}
        logits = template.logits(batch["hidden"])
        delta_logits = student(batch["input_ids"], batch["attention_mask"], batch["positions"])
        pair = [objective(logits, some, batch["labels"], 0.0).cpu() for some in (delta_logits, delta_logits * 0)]
        sums += torch.stack(pair) * len(example.labels)
        count += len(example.labels)
    steered, base = (sums / count).tolist()
    return round(steered, 4), round(base, 4)


class _Progress(ProgressCallback):  # type: ignore[misc]
    """The bar on stderr with the loss beside it; Trainer's own writes its logs to stdout."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        losses = {key: f"{logs[key]:.3f}" for key in ("loss", "eval_loss") if key in logs}
        if self.training_bar is not None and losses:
            self.training_bar.set_postfix(losses)


def _arguments(recipe: Recipe, num_examples: int, folder: str, *, evaluate: bool) -> TrainingArguments:
    settings = recipe.optimisation
    steps = -(-num_examples // settings.batch_size) * settings.epochs
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=round(settings.warmup_share * steps),
        lr_scheduler_type="cosine",
        max_grad_norm=settings.max_grad_norm,
        seed=recipe.seed,
        logging_steps=LOGGING_STEPS,
        eval_strategy="epoch" if evaluate else "no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
