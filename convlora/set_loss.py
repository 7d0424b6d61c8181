"""The loss of masks as a set (Mask2Former, Cheng et al., CVPR 2022, arXiv:2112.01527).

Each class in an image is one mask. These are matched, one to one, with the masks of queries that fit them
best, and what no class was matched with learns to be none.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from convlora import IGNORED
from convlora.losses import ClassWeighted, dice_loss


class Queries(NamedTuple):
    """Masks that say of which class they are.

    Attributes:
        classes: logits [n, q, c + 1], the last for no class.
        masks: logits [n, q, h, w].
        size: of the network's input, to which the masks are brought.
    """

    classes: Tensor
    masks: Tensor
    size: tuple[int, int]


class Pairs(NamedTuple):
    """What was matched: image, query and class of each target mask [m]."""

    image: Tensor
    query: Tensor
    kind: Tensor


class SetLoss(ClassWeighted):
    """Cross-entropy of the queries' classes, binary cross-entropy and Dice of the masks that were matched.

    Each of the three is a mean over the queries, or the masks, of an image, weighted by class; the loss is
    their weighted sum, a mean over images. In training masks are compared at points, pixels that are drawn at
    random: for the matching evenly, for the terms the least sure of more of them, and a few evenly. In
    evaluation all pixels are compared. Ignored pixels are never drawn and count in no sum; an image that is
    nothing else costs 0.

    Args:
        costs: weights of class, mask and Dice by which queries are matched. While masks say little, those of
            Mask2Former, (2, 5, 5), match another query with a class at each step, so that few images teach
            none; a greater one of the class keeps to a query.
        weights: of the three terms.
        no_class_weight: of the queries that were matched with nothing.
        num_points: at which a mask is compared; all pixels where there are no more.
        oversample_ratio: points, as a multiple of `num_points`, of which the least sure are chosen.
        importance_sample_ratio: share of the points that are so chosen, 0 to 1.
        class_weights: see `ClassWeighted`.

    Raises:
        ValueError: a number is impossible.
    """

    takes_outputs = True

    def __init__(
        self,
        costs: Sequence[float] = (20.0, 5.0, 5.0),
        weights: Sequence[float] = (2.0, 5.0, 5.0),
        no_class_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
    ):
        super().__init__(class_weights)
        for key, values in (("costs", costs), ("weights", weights)):
            if len(values) != 3 or not all(0 <= value < math.inf for value in values) or not any(values):
                raise ValueError(
                    f"loss.{key}={list(values)} must be three numbers of at least 0, and not all 0: those of "
                    f"class, mask and Dice, as in loss.{key}=[2,5,5]"
                )
        if not 0 < no_class_weight < math.inf:
            raise ValueError(f"loss.no_class_weight={no_class_weight} must be more than 0; 0.1 is usual")
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
            raise ValueError(
                f"loss.num_points={num_points} and loss.oversample_ratio={oversample_ratio} must be at least "
                f"1 and loss.importance_sample_ratio={importance_sample_ratio} from 0 to 1"
            )
        self.costs = costs
        self.weights = weights
        self.no_class_weight = no_class_weight
        self.num_points = num_points
        self.num_candidates = round(oversample_ratio * num_points)
        self.num_unsure = round(importance_sample_ratio * num_points)

    def forward(self, outputs: Queries, masks: Tensor) -> Tensor:
        """Return the loss of queries against class ids [n, 1, *size]."""
        if not isinstance(outputs, Queries):
            raise ValueError(
                "loss=set is for a head of queries, and this one gives logits; set head=query, or "
                "loss=cross_entropy_dice"
            )
        with torch.autocast(masks.device.type, enabled=False):
            classes, logits = outputs.classes.float(), outputs.masks.float()
            labels = Labels(masks[:, 0], classes.shape[2] - 1)
            with torch.no_grad():
                pairs = match(self._costs(classes, logits, labels), labels.present)
            class_weights = self.weights_of(labels.num_classes, masks.device)
            terms = (
                self._class_term(classes, labels, pairs, class_weights),
                *self._mask_terms(logits, labels, pairs, class_weights[pairs.kind]),
            )
            return sum(
                (weight * term.mean() for weight, term in zip(self.weights, terms, strict=True)),
                start=torch.zeros((), device=masks.device),
            )

    def _is_sampled(self, labels: "Labels") -> bool:
        return self.training and self.num_points < labels.ids.shape[1]

    def _costs(self, classes: Tensor, logits: Tensor, labels: "Labels") -> Tensor:
        """Return what matching each query with each class costs [n, q, c]."""
        every = torch.arange(len(logits), device=logits.device)
        points = labels.draw(every, self.num_points) if self._is_sampled(labels) else None
        found, ids = sample(logits, points, labels.size), labels.at(every, points)
        valid = (ids != IGNORED).float()[:, None]
        kinds = torch.arange(labels.num_classes, device=ids.device)
        target = (ids[:, None] == kinds[:, None]).float()
        # of a pixel, softplus(x) - x t is the binary cross-entropy of logit x and target t
        entropy = (F.softplus(found) * valid).sum(dim=2)[:, :, None] - torch.einsum(
            "nqp,ncp->nqc", found, target
        )
        probs = found.sigmoid() * valid
        dice = dice_loss(
            torch.einsum("nqp,ncp->nqc", probs, target),
            probs.sum(dim=2)[:, :, None] + target.sum(dim=2)[:, None],
        )
        for_class, for_mask, for_dice = self.costs
        return (
            for_mask * entropy / valid.sum(dim=2, keepdim=True).clamp(min=1)
            + for_dice * dice
            - for_class * classes.softmax(dim=2)[..., :-1]
        )

    def _class_term(self, classes: Tensor, labels: "Labels", pairs: Pairs, weights: Tensor) -> Tensor:
        """Return the cross-entropy of the queries' classes, the mean of each image [n]."""
        target = torch.full(classes.shape[:2], labels.num_classes, device=classes.device)
        target = target.index_put((pairs.image, pairs.query), pairs.kind)
        weight = torch.cat([weights, weights.new_tensor([self.no_class_weight])])[target]
        weight = weight * labels.present.any(dim=1, keepdim=True)
        entropy = F.cross_entropy(classes.transpose(1, 2), target, reduction="none")
        return _mean(entropy, weight)

    def _mask_terms(
        self, logits: Tensor, labels: "Labels", pairs: Pairs, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return binary cross-entropy and Dice loss of the matched masks, the mean of each image [n]."""
        chosen = logits[pairs.image, pairs.query][:, None]
        points = self._unsure_points(chosen, labels, pairs) if self._is_sampled(labels) else None
        found, ids = sample(chosen, points, labels.size)[:, 0], labels.at(pairs.image, points)
        valid, target = (ids != IGNORED).float(), (ids == pairs.kind[:, None]).float()
        entropy = _mean(F.binary_cross_entropy_with_logits(found, target, reduction="none"), valid)
        probs = found.sigmoid() * valid
        dice = dice_loss((probs * target).sum(dim=1), (probs + target).sum(dim=1))
        images = torch.arange(len(logits), device=logits.device)
        weight = (pairs.image == images[:, None]) * weights  # [n, m]
        return _mean(entropy.expand_as(weight), weight), _mean(dice.expand_as(weight), weight)

    def _unsure_points(self, chosen: Tensor, labels: "Labels", pairs: Pairs) -> Tensor:
        """Draw pixels [m, num_points] for each of the masks [m, 1, h, w]."""
        candidates = labels.draw(pairs.image, self.num_candidates)
        with torch.no_grad():
            sure = sample(chosen, candidates, labels.size)[:, 0].abs()
        unsure = candidates.gather(1, sure.topk(self.num_unsure, dim=1, largest=False).indices)
        return torch.cat([unsure, labels.draw(pairs.image, self.num_points - self.num_unsure)], dim=1)


class Labels:
    """Class ids of images, and points among the pixels that have one.

    Args:
        masks: class ids [n, h, w].
        num_classes: that there may be.

    Attributes:
        ids: of the pixels of each image [n, h * w].
        present: whether an image has a class [n, c].
    """

    def __init__(self, masks: Tensor, num_classes: int):
        self.size = masks.shape[1], masks.shape[2]
        self.num_classes = num_classes
        self.ids = masks.flatten(1)
        self.present = torch.stack([(self.ids == kind).any(dim=1) for kind in range(num_classes)], dim=1)
        self._ranked: tuple[Tensor, Tensor] | None = None

    def draw(self, images: Tensor, count: int) -> Tensor:
        """Draw pixels [m, count] of images [m], evenly among those with a label; any where there is none."""
        pixels, number = self._rank()
        number = number[images, None]
        place = torch.rand(len(images), count, device=images.device) * number
        place = torch.minimum(place.long(), (number - 1).clamp(min=0))
        return pixels.flatten()[images[:, None] * pixels.shape[1] + place]

    def at(self, images: Tensor, points: Tensor | None) -> Tensor:
        """Return the class ids of images [m] at pixels [m, points]; at all of them if these are None."""
        return self.ids[images] if points is None else self.ids[images].gather(1, points)

    def _rank(self) -> tuple[Tensor, Tensor]:
        """Return the pixels of each image that have a label, first, and their number; no wait for a GPU."""
        if self._ranked is None:
            valid = self.ids != IGNORED
            count = self.ids.shape[1]
            place = torch.where(valid, valid.cumsum(dim=1) - 1, count)
            pixels = torch.arange(count, device=valid.device).expand_as(place)
            ranked = place.new_zeros(len(place), count + 1).scatter(1, place, pixels)
            self._ranked = ranked, valid.sum(dim=1)
        return self._ranked


def sample(maps: Tensor, points: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Return the values of maps at pixels of images, bilinear.

    Args:
        maps: [n, k, h, w], which cover the images.
        points: pixels [n, p], numbered row by row; None for all of them.
        size: height and width of the images.

    Returns:
        Values [n, k, p], those that `F.interpolate` gives.
    """
    if points is None:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).flatten(2)
    n, k, h, w = maps.shape
    top, bottom, down = _between(points // size[1], h, size[0])
    left, right, along = _between(points % size[1], w, size[1])
    flat = maps.flatten(2)

    def take(row: Tensor, column: Tensor) -> Tensor:
        return flat.gather(2, (row * w + column)[:, None].expand(n, k, -1))

    upper = torch.lerp(take(top, left), take(top, right), along[:, None])
    lower = torch.lerp(take(bottom, left), take(bottom, right), along[:, None])
    return torch.lerp(upper, lower, down[:, None])


def _between(index: Tensor, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return between which of `count` cells the centre of pixel `index` of `size` lies, and how far."""
    place = ((index + 0.5) * (count / size) - 0.5).clamp(min=0)
    first = place.long().clamp(max=count - 1)
    return first, (first + 1).clamp(max=count - 1), place - first


def match(costs: Tensor, present: Tensor) -> Pairs:
    """Match each class in an image with a query of its own, so that it costs the least in all.

    Args:
        costs: of queries and classes [n, q, c].
        present: whether a class is in the image [n, c].
    """
    if isinstance(costs, FakeTensor):  # which has no values: of a step that is followed for its memory
        found = [(i, c, c) for i in range(len(costs)) for c in range(costs.shape[2])]
    else:
        # together, since a transfer waits for the device
        table = torch.cat([costs, present[:, None].to(costs.dtype)], dim=1).cpu().numpy()
        found = []
        for image, each in enumerate(table):
            kinds = np.flatnonzero(each[-1])
            queries, order = linear_sum_assignment(np.nan_to_num(each[:-1, kinds]))
            found += [(image, *pair) for pair in zip(queries, kinds[order], strict=True)]
    pairs = torch.from_numpy(np.array(found, dtype=np.int64).reshape(-1, 3)).to(costs.device)
    return Pairs(*pairs.unbind(dim=1))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of each row [n], 0 where all its weights are."""
    total = weights.sum(dim=1)
    return (values * weights).sum(dim=1) / torch.where(total > 0, total, 1)
