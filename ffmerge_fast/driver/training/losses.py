"""What a batch costs a model: the loss, how many labels it is a mean over, and distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.forward import unwrap
from ...support.errors import FFMergeError
from ..tasks.text import IGNORED

LossFunction = Callable[[nn.Module, Any], Any]


def shifts_labels(model: nn.Module) -> bool:
    """Whether label t is compared with the output at t-1: decoder-only language models of transformers."""
    model = unwrap(model)
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def label_count(model: nn.Module, batch: Any) -> int:
    """How many labels the batch's mean loss is over: positions not -100, without the first of a language model.

    A batch without a tensor under "labels" counts as many as its first tensor has rows.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return _rows(batch)
    if labels.is_floating_point():
        return len(labels)
    if labels.ndim == 2 and shifts_labels(model):
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def loss_of(output: Any) -> Tensor:
    """The scalar loss of a model's output (`.loss`, or the output itself if it is a scalar tensor)."""
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise FFMergeError(
            f"the model returned a {type(output).__name__} without a scalar .loss; put labels in the batches or pass "
            "loss_fn(model, batch)"
        )
    return loss.reshape(())


def distillation_loss(model: nn.Module, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student), mean over the labelled positions; logits [..., classes], labels [...]."""
    if student.ndim == 3 and shifts_labels(model):
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    wanted = labels != IGNORED
    log_student, log_teacher = (F.log_softmax(x[wanted].float() / temperature, dim=-1) for x in (student, teacher))
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


def _rows(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)


@torch.no_grad()
def teacher_logits(teacher: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The teacher's logits for a batch."""
    return teacher(**batch).logits
