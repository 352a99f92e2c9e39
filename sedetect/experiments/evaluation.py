"""The cost of an intervention: perplexity per text domain, and exact answers after greedy decoding."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedetect.calibration.windows import Windows, batches
from sedetect.errors import SedetectError
from sedetect.files import check_readable
from sedetect.models.layers import refuse_encoder_decoder, refuse_without_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over predictions next-token predictions."""

    value: float
    predictions: int

    @classmethod
    def of(cls, total: float, predictions: int) -> "Perplexity":
        """From the sum of all losses."""
        mean = total / predictions
        return cls(math.exp(mean) if mean < 700 else math.inf, predictions)


@torch.no_grad()
def perplexity(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    *,
    prefix: int,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Perplexity]:
    """Perplexity of every domain, over all tokens of its windows but the prefix (and the first, without a prefix).

    Args:
        prefix: number of tokens of each window that are the tokenizer's prefix.
        progress: called with the number of tokens after every batch.
    Raises:
        SedetectError: for an encoder-decoder model, and one without logits.
    """
    refuse_encoder_decoder(model, "perplexity")
    refuse_without_logits(model, "perplexity")
    results = {}
    for domain, windows in domains.items():
        total, count = 0.0, 0
        for ids, _ in batches(windows, batch_size):
            for loss in window_losses(model, ids, prefix):
                total += loss
            count += len(ids) * predictions(ids, prefix)
            progress(ids.numel())
        results[domain] = Perplexity.of(total, count)
    return results


def window_losses(model: "PreTrainedModel", ids: torch.Tensor, prefix: int) -> list[float]:
    """Negative log-likelihood (nats) of each window of ids (B, L), summed over its predictions."""
    return logit_losses(next_logits(model, ids, prefix), ids)


def next_logits(model: "PreTrainedModel", ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """The logits (B, P, V) of all predictions of windows of ids (B, L), in the model's dtype."""
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits[:, max(prefix, 1) - 1 : -1]


def logit_losses(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """window_losses by the logits (B, P, V) of next_logits."""
    # float32, one sequence at a time: the logits of a large vocabulary are most of the memory.
    pairs = zip(logits, ids[:, -logits.shape[1] :].to(logits.device), strict=True)
    return [float(nn.functional.cross_entropy(row.float(), target, reduction="sum").double()) for row, target in pairs]


def predictions(ids: torch.Tensor, prefix: int) -> int:
    """The number of predicted tokens in a window of ids (B, L): all but the prefix, or all but the first without
    one.
    """
    return ids.shape[1] - max(prefix, 1)


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that greedy decoding must begin with."""

    prompt: str
    answer: str


def load_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read a .jsonl file, one object with "prompt" and "answer" per line. Raises SedetectError for anything else."""
    try:
        check_readable(path)
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SedetectError(f"{path}: cannot be read ({error}); give a .jsonl of prompts with answers") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question = Question(record["prompt"], record["answer"])
            if not all(isinstance(text, str) and text.strip() for text in (question.prompt, question.answer)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise SedetectError(
                f'{path}: line {number} is not an object with the texts "prompt" and "answer"; fix it'
            ) from None
        questions.append(question)
    if not questions:
        raise SedetectError(f"{path}: no questions in it; give one object per line")
    return questions


@torch.no_grad()
def exact_match(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: list[Question],
    *,
    progress: Callable[[int], None] = lambda questions: None,
) -> float:
    """Share of questions for which greedy decoding begins with the answer, ignoring surrounding white space.

    As many tokens are decoded as the answer has, plus two; text after the answer is ignored, unless it continues the
    answer's last word or number.
    """
    generate: Any = model.generate  # of GenerationMixin, which PreTrainedModel is not
    right = 0
    for question in questions:
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids.to(model.device)
        wanted = question.answer.strip()
        length = len(tokenizer(question.answer, add_special_tokens=False).input_ids) + 2
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        written = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        after = written[len(wanted) : len(wanted) + 1]
        right += written.startswith(wanted) and not after.isalnum()  # "18" does not answer "1"
        progress(1)
    return right / len(questions)
