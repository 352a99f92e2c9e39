"""torchvision beside a torch for CPUs, where its wheel is one for CUDA: what it needs to be imported.

Its extension does not load there, so that operators are missing of which it describes what they give. No processor uses
them.
"""

import torch

try:
    import torchvision
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
