"""Images and sound of a calibration: the chats that hold some, and the processor that reads them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sedetect.calibration.chats import Chats, has_media, make_chats
from sedetect.calibration.drawn import draw_images, why_not
from sedetect.calibration.records import Document
from sedetect.calibration.windows import IMAGES, Text
from sedetect.checkpoints.options import Loading
from sedetect.errors import Argument, SedetectError
from sedetect.models.layers import has_encoder
from sedetect.models.loading import load_processor
from sedetect.models.modalities import placeholders
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass
class Pictured:
    """Domains of chats with images or sound, and the processor that reads them; notes: on images that are left out.

    asked: they were; else images are only the default.
    """

    domains: dict[str, Iterable[Document]] = field(default_factory=dict)
    processor: "ProcessorMixin | None" = None
    asked: bool = True
    notes: list[Note] = field(default_factory=list)

    def chats(self, model: "PreTrainedModel", text: Text, corpus: str) -> tuple[dict[str, Chats], list[Note]]:
        """make_chats, for this model; of an encoder-decoder none. Raises SedetectError where they were asked for."""
        if not self.domains:
            return {}, self.notes
        if has_encoder(model):
            why = f"{type(model).__name__}: its encoder reads images and sound, whose rows are not mapped to tokens"
            if self.asked:
                raise SedetectError(f"{why}; leave out domain {next(iter(self.domains))!r}")
            return {}, [*self.notes, Note("images_left_out", f"images left out: {why}")]
        assert self.processor is not None  # find_pictured
        found, notes = make_chats(
            self.processor,
            self.domains,
            text,
            placeholders(model.config),
            corpus=corpus,
            vocab_size=model.get_input_embeddings().get_parameter("weight").shape[0],
            max_positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )
        return found, [*self.notes, *notes]


def find_pictured(
    model: "str | os.PathLike[str] | PreTrainedModel",
    documents: Mapping[str, Iterable[Document]],
    text: Text,
    loading: Loading,
    processor: "ProcessorMixin | None",
    *,
    embedded: bool,
    unfit: tuple[str | Argument, ...] = (),
) -> Pictured:
    """What of the documents holds images or sound, and the drawn images, where they are asked for or the default.

    Args:
        processor: of a loaded model; of a checkpoint it is found there.
        embedded: the documents are the embedded text, to which images belong of a model that takes them.
        unfit: what of this run takes text alone, as parts of a message.
    Raises:
        SedetectError: where images or sound are asked for that the model or the run does not take.
    """
    domains = {name: found for name, found in documents.items() if has_media(found)}
    drawn = text.domains is not None and IMAGES in text.domains and IMAGES not in documents
    asked = drawn or bool(domains)
    if not asked and (text.domains is not None or not embedded):
        return Pictured()
    try:
        if processor is None and isinstance(model, (str, os.PathLike)):
            processor = load_processor(model, loading)
        if getattr(processor, "image_processor", None) is None and (drawn or not domains):
            if not asked:
                return Pictured()
            _refuse(model, IMAGES)
        if processor is None:
            _refuse(model, next(iter(domains)))
        if unfit:
            what = IMAGES if drawn or not asked else f"domain {next(iter(domains))!r} with its images or sound"
            raise SedetectError(*unfit, f" reads text alone; leave it out, or {what}")
        if (drawn or not asked) and (why := why_not()):
            raise SedetectError(why)
    except SedetectError as error:
        if asked:
            raise
        return Pictured(notes=[Note("images_left_out", f"images left out: {error}")])
    if drawn or not asked:
        domains[IMAGES] = draw_images()
    return Pictured(domains, processor, asked)


def _refuse(model: "str | os.PathLike[str] | PreTrainedModel", domain: str) -> None:
    if isinstance(model, (str, os.PathLike)):
        raise SedetectError(
            f"{model}: takes text alone (no processor that reads images or sound beside it), and domain {domain!r} "
            "holds some; leave it out, or give a multimodal checkpoint"
        )
    raise SedetectError(
        f"{type(model).__name__}: needs its processor to read the images or sound of domain {domain!r}; pass processor="
    )
