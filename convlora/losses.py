"""Losses of mask logits [n, c, h, w] against class ids [n, 1, h, w]; each a mean over images.

Those of a foreground take c = 1 and ids 0 and 1. Ignored pixels count in no sum, so that they have no
gradient; an image that is nothing else costs 0. A loss whose `takes_outputs` is true is one of the head's
outputs instead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from convlora import IGNORED

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
        logits, target, valid = _binary(logits, masks)
        # an ignored neighbour is taken for what the pixel itself is, so that it makes no boundary
        around = local_mean(target > 0) + target * local_mean(valid == 0)
        weights = valid * (1 + BOUNDARY_GAIN * (around - target).abs())
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        cross_entropy = weighted_mean(cross_entropy, weights if self.boundary_weighted else valid)
        probs = torch.sigmoid(logits)
        intersection = (weights * probs * target).sum(dim=(1, 2, 3))
        total = (weights * (probs + target)).sum(dim=(1, 2, 3))
        iou = (intersection + 1) / (total - intersection + 1)
        return (cross_entropy + 1 - iou).mean()


class BceDiceLoss(nn.Module):
    """Binary cross-entropy, a mean over pixels, plus soft Dice loss (Milletari et al., 3DV 2016)."""

    def __init__(self) -> None:  # without it torch's would take any key
        super().__init__()

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits, target, valid = _binary(logits, masks)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (weighted_mean(cross_entropy, valid) + binary_dice_loss(logits, target, valid)).mean()


class FocalDiceLoss(nn.Module):
    """Focal loss (Lin et al., ICCV 2017), a mean over pixels, plus soft Dice loss.

    Args:
        gamma: how much less a pixel counts the surer it is right; 0 makes it plain cross-entropy.
        alpha: weight of the foreground, 1 - alpha that of the background, 0 to 1.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25):
        super().__init__()
        if gamma < 0 or not 0 <= alpha <= 1:
            raise ValueError(f"loss.gamma={gamma} must be at least 0 and loss.alpha={alpha} from 0 to 1")
        self.gamma = gamma
        self.alpha = alpha

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits, target, valid = _binary(logits, masks)
        focal = sigmoid_focal_loss(logits, target, self.alpha, self.gamma)
        return (weighted_mean(focal, valid) + binary_dice_loss(logits, target, valid)).mean()


class BalancedBceLoss(nn.Module):
    """Binary cross-entropy balanced in each image, a mean over pixels (HED, Xie and Tu, ICCV 2015, eq. 2).

    Each foreground pixel is weighted by the background's share of the pixels and the reverse, so that both
    kinds weigh the same; the rarer one of them is, the less the image costs. An image of one kind costs
    nothing. The code released with Conv-LoRA does the same for shadows.
    """

    def __init__(self) -> None:  # without it torch's would take any key
        super().__init__()

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits, target, valid = _binary(logits, masks)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        share = weighted_mean(target, valid)[:, None, None, None]
        weights = target * (1 - share) + (1 - target) * share
        return weighted_mean(weights * cross_entropy, valid).mean()


class ClassWeighted(nn.Module):
    """A loss that weighs classes.

    Args:
        class_weights: of each class; `balanced` waits for `balance`, None weighs all alike.

    Raises:
        ValueError: a weight is impossible, or all are 0.
    """

    _weights: Tensor | None

    def __init__(self, class_weights: Literal["balanced"] | Sequence[float] | None = None):
        super().__init__()
        self.class_weights = class_weights
        self.register_buffer("_weights", None, persistent=False)
        if class_weights is None or class_weights == "balanced":
            return
        if isinstance(class_weights, str) or not all(0 <= weight < math.inf for weight in class_weights):
            raise ValueError(
                f"loss.class_weights={class_weights} must be numbers of at least 0, or balanced, or null"
            )
        if not any(class_weights):
            raise ValueError(f"loss.class_weights={class_weights} weigh nothing; set one to more than 0")
        self._weights = torch.tensor(list(class_weights), dtype=torch.float32)

    def balance(self, shares: Sequence[float]) -> None:
        """Weigh each class by the median share over its own (Eigen and Fergus, ICCV 2015).

        Args:
            shares: of each class in the pixels of the images in which it is; 0 of one that is in none, whose
                weight is 1.
        """
        known = np.array(shares, dtype=np.float64)
        weights = np.median(known[known > 0]) / np.where(known > 0, known, 1)
        self._weights = torch.from_numpy(np.where(known > 0, weights, 1).astype(np.float32))

    def told(self, class_names: Sequence[str]) -> str:
        """Return what a user reads of the weights: `land 0.52, road 3.1`."""
        if self._weights is None:
            return "the median share of the pixels over each class's own, in the training masks"
        named = zip(class_names, self._weights.tolist(), strict=True)
        return ", ".join(f"{name} {weight:.6g}" for name, weight in named)

    def weights_of(self, num_classes: int, device: torch.device) -> Tensor:
        """Return the weights [num_classes], all 1 while none are known.

        Raises:
            ValueError: they are of another number of classes.
        """
        if self._weights is None:
            return torch.ones(num_classes, device=device)
        if len(self._weights) != num_classes:
            raise ValueError(
                f"loss.class_weights={self._weights.tolist()} are {len(self._weights)} numbers for "
                f"{num_classes} classes; give one for each"
            )
        return self._weights.to(device)


class CrossEntropyDiceLoss(ClassWeighted):
    """Softmax cross-entropy, a mean over pixels, plus soft Dice loss, a mean over the classes in the mask.

    Weights of classes are those of their pixels in the mean of the cross-entropy. The Dice loss, in which all
    classes in the mask count alike, has none.
    """

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits, ids = logits.float(), masks[:, 0].long()
        if logits.shape[1] < 2:
            raise ValueError("cross_entropy_dice is for several classes, here is one; set loss=structure")
        weights = self.weights_of(logits.shape[1], logits.device)
        cross_entropy = F.cross_entropy(logits, ids, ignore_index=IGNORED, reduction="none")[:, None]
        valid = (ids != IGNORED).float()[:, None]
        weight = valid * weights[ids.clamp(max=len(weights) - 1)][:, None]
        probs = torch.softmax(logits, dim=1) * valid
        # bytes, because one-hot floats of large images would take more memory than all the rest
        own = [ids == index for index in range(logits.shape[1])]
        overlap = torch.stack([(probs[:, c] * mask).sum(dim=(1, 2)) for c, mask in enumerate(own)], dim=1)
        size = torch.stack([mask.sum(dim=(1, 2)) for mask in own], dim=1)
        dice = dice_loss(overlap, probs.sum(dim=(2, 3)) + size)
        there = (size > 0).float()
        dice = (dice * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return (weighted_mean(cross_entropy, weight) + dice).mean()


def balanced(loss: nn.Module) -> list[ClassWeighted]:
    """Return the parts of a loss whose weights of classes follow from the training masks, by `balance`."""
    parts = (each for each in loss.modules() if isinstance(each, ClassWeighted))
    return [each for each in parts if isinstance(each.class_weights, str)]


def takes_outputs(loss: nn.Module) -> bool:
    """Return whether a loss is one of the head's outputs, where others are of logits."""
    return bool(getattr(loss, "takes_outputs", False))


class SoftClDiceLoss(nn.Module):
    """Soft centreline Dice loss of thin things (Shit et al., "clDice", CVPR 2021, arXiv:2003.07311).

    The harmonic mean of two shares: of the prediction's skeleton that lies in the mask, and of the mask's
    skeleton that lies in the prediction. It rewards whole lines, whatever their width, so another loss has to
    stand beside it.

    Args:
        iterations: of the soft skeleton, at least half the width of the widest thing, px.
    """

    def __init__(self, iterations: int = 10):
        super().__init__()
        if iterations < 1:
            raise ValueError(
                f"iterations={iterations} must be at least 1, half the width of the widest thing in pixels"
            )
        self.iterations = iterations

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits, target, valid = _binary(logits, masks)
        probs = torch.sigmoid(logits) * valid
        found = _share(soft_skeleton(probs, self.iterations), target)
        hit = _share(soft_skeleton(target, self.iterations), probs)
        return (1 - 2 * found * hit / (found + hit)).mean()


def soft_skeleton(probs: Tensor, iterations: int) -> Tensor:
    """Return the soft skeleton of maps [n, 1, h, w] with values of 0 to 1.

    It is what the openings of the erosions leave over; of a mask the morphological skeleton.
    """
    skeleton = torch.zeros_like(probs)
    for _ in range(iterations + 1):
        eroded = _erode(probs)
        ridge = F.relu(probs - F.max_pool2d(eroded, 3, stride=1, padding=1))
        skeleton = skeleton + F.relu(ridge - skeleton * ridge)
        probs = eroded
    return skeleton


def _erode(probs: Tensor) -> Tensor:
    """Return the least value of each pixel and its four neighbours."""
    rows = -F.max_pool2d(-probs, (3, 1), stride=1, padding=(1, 0))
    return torch.minimum(rows, -F.max_pool2d(-probs, (1, 3), stride=1, padding=(0, 1)))


def _share(skeleton: Tensor, region: Tensor) -> Tensor:
    """Return which share of each skeleton lies in the region [n]; of an empty one all of it does."""
    return ((skeleton * region).sum(dim=(1, 2, 3)) + 1) / (skeleton.sum(dim=(1, 2, 3)) + 1)


class Weighted(nn.Module):
    """A sum of losses, each with its weight.

    Args:
        terms: the losses by name, all of logits or all of the head's outputs.
        weights: by the same names, at least 0.

    Raises:
        ValueError: a term has no weight or an impossible one, or terms are of different kinds.
    """

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float]):
        super().__init__()
        if terms.keys() != weights.keys() or not terms:
            raise ValueError(
                f"loss.weights has {', '.join(weights)}, but loss.terms {', '.join(terms)}; give each term "
                "its weight"
            )
        if not any(weights.values()):
            raise ValueError("loss.weights are all 0, so nothing would be trained; give one above 0")
        wrong = [
            f"loss.weights.{name}={weight}" for name, weight in weights.items() if not 0 <= weight < math.inf
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} must be a number of at least 0; 0 leaves the term out")
        of_outputs = [name for name, term in terms.items() if takes_outputs(term)]
        if 0 < len(of_outputs) < len(terms):
            of_logits = ", ".join(name for name in terms if name not in of_outputs)
            raise ValueError(
                f"loss.terms are of the head's outputs ({', '.join(of_outputs)}) and of logits "
                f"({of_logits}), which do not add up; leave out those of one kind"
            )
        self.terms = nn.ModuleDict(terms)
        self.takes_outputs = bool(of_outputs)
        self.weights = dict(weights)

    def forward(self, outputs: Any, masks: Tensor) -> Tensor:
        parts = [weight * self.terms[name](outputs, masks) for name, weight in self.weights.items() if weight]
        return torch.stack(parts).sum()


def binary_dice_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the soft Dice loss of each image [n]."""
    probs = torch.sigmoid(logits) * valid
    overlap, total = (probs * target).sum(dim=(1, 2, 3)), (probs + target).sum(dim=(1, 2, 3))
    return dice_loss(overlap, total)


def dice_loss(overlap: Tensor, total: Tensor) -> Tensor:
    """Return 1 - (2 |P T| + 1) / (|P| + |T| + 1); the 1 makes nothing found in an empty mask cost nothing."""
    return 1 - (2 * overlap + 1) / (total + 1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of each image [n], 0 where all its weights are."""
    total = weights.sum(dim=(1, 2, 3))
    return (values * weights).sum(dim=(1, 2, 3)) / torch.where(total > 0, total, 1)


def local_mean(masks: Tensor) -> Tensor:
    """Return the share of a square neighbourhood that masks cover, bool [n, c, h, w]; none beyond the border.

    It takes differences of running sums, whose cost does not grow with the neighbourhood. Sums of integers
    are exact, and alike at each run on a GPU.
    """
    half = NEIGHBOURHOOD // 2
    sums = F.pad(masks, (half + 1, half, half + 1, half)).int()
    for axis in (2, 3):
        running = sums.cumsum(axis, dtype=torch.int32)
        ends, starts = (running.narrow(axis, at, masks.shape[axis]) for at in (NEIGHBOURHOOD, 0))
        sums = ends - starts
    return sums / NEIGHBOURHOOD**2


def _binary(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, foreground (0 where ignored) and valid pixels as float32 [n, 1, h, w]."""
    if logits.shape[1] != 1:
        raise ValueError(
            f"the loss is for a foreground, here are {logits.shape[1]} classes; set loss=cross_entropy_dice"
        )
    return logits.float(), (masks == 1).float(), (masks != IGNORED).float()
