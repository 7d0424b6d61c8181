"""Losses of mask logits [n, 1, h, w] against masks of 0 and 1 of the same shape; each a mean over images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBOURHOOD = 31  # pixels; PraNet, Fan et al., MICCAI 2020, arXiv:2006.11392
BOUNDARY_GAIN = 5.0


class StructureLoss(nn.Module):
    """Binary cross-entropy plus soft IoU, weighted towards boundaries (F3Net, Wei et al., AAAI 2020).

    Args:
        boundary_weighted: weight the cross-entropy too, as published. The code released with Conv-LoRA
            averages it plainly; False repeats that.
    """

    def __init__(self, boundary_weighted: bool = True):
        super().__init__()
        self.boundary_weighted = boundary_weighted

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the scalar loss, computed in float32."""
        logits, masks = logits.float(), masks.float()
        weights = 1 + BOUNDARY_GAIN * (local_mean(masks) - masks).abs()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
        if self.boundary_weighted:
            cross_entropy = (weights * cross_entropy).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))
        probs = torch.sigmoid(logits)
        intersection = (weights * probs * masks).sum(dim=(2, 3))
        total = (weights * (probs + masks)).sum(dim=(2, 3))
        iou = (intersection + 1) / (total - intersection + 1)
        return cross_entropy.mean() + (1 - iou).mean()


def local_mean(masks: Tensor) -> Tensor:
    """Mean over a square neighbourhood, zeros beyond the border; a pass per axis reads 62 pixels, not 961."""
    half = NEIGHBOURHOOD // 2
    rows = F.avg_pool2d(masks, (NEIGHBOURHOOD, 1), stride=1, padding=(half, 0))
    return F.avg_pool2d(rows, (1, NEIGHBOURHOOD), stride=1, padding=(0, half))
