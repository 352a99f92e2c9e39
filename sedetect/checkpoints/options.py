"""How a checkpoint is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loading:
    """How a checkpoint is loaded.

    device             target device; None is cuda if available, else cpu
    dtype              "auto" is the checkpoint's own; otherwise a torch floating-point type or its name
    revision           branch, tag or commit of a hub model
    attn               attention implementation of transformers ("eager", "sdpa", ...); None leaves the choice to it
    trust_remote_code  run model code that comes with the checkpoint
    multimodal         load the image and sound towers too, where the text model could be loaded alone
    """

    device: "str | torch.device | None" = None
    dtype: "str | torch.dtype" = "auto"
    revision: str | None = None
    attn: str | None = None
    trust_remote_code: bool = False
    multimodal: bool = False

    @property
    def source(self) -> dict[str, Any]:
        """The arguments with which transformers finds and reads all files but the weights."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
