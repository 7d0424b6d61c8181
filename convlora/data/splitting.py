"""A split of a folder's images into training, validation and test, drawn once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convlora import IGNORED
from convlora.data.check import Facts


def label(facts: Sequence[Facts], class_names: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return for each class, and for empty masks, which images show it; what no image shows is left out.

    An empty mask has no foreground or, of several classes, no pixel that counts.
    """
    first = int(len(class_names) == 1)  # the id of a foreground alone is 1
    there = np.array([each.classes[first:IGNORED][: len(class_names)] > 0 for each in facts])
    names = [*class_names, "no foreground" if first else "no class"]
    shown = np.column_stack([there, ~there.any(axis=1)])
    return {name: shown[:, index] for index, name in enumerate(names) if shown[:, index].any()}


def draw_split(
    groups: NDArray[np.int64], labels: NDArray[np.bool_], shares: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Share images out so that each part has its share of all of them and of those with each label.

    This is iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011) over groups instead of
    single images. The rarest label that is left goes first, of its images the largest group, and each group
    goes to the part that lacks most images of the label, then most of all. `seed` decides
    between equals, parts and groups alike.

    Args:
        groups: group of each image [n], 0, 1, 2, ...; those of one group stay together.
        labels: which labels each image has [n, labels], at least one.
        shares: of the parts, which add up to 1.
        seed: of the random order.

    Returns:
        The part of each image [n].

    Raises:
        ValueError: there are fewer groups than parts.
    """
    count, parts = int(groups.max(initial=-1)) + 1, len(shares)
    if count < parts:
        raise ValueError(f"{count} groups of images are fewer than the {parts} parts; add images")
    # images of each group with each label, and in the last column all of them
    columns = np.column_stack([labels, np.ones(len(groups), bool)])
    sizes = np.zeros((count, columns.shape[1]), np.int64)
    np.add.at(sizes, groups, columns)
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    lacking = np.outer(shares, sizes.sum(axis=0))
    part_of = np.full(count, -1)
    while (left := part_of < 0).any():
        remaining = sizes[left, :-1].sum(axis=0)
        rarest = int(np.argmin(np.where(remaining > 0, remaining, len(groups) + 1)))
        chosen = [group for group in order if left[group] and sizes[group, rarest]]
        for group in sorted(chosen, key=lambda group: -sizes[group, rarest]):
            empty = [part for part in range(parts) if not (part_of == part).any()]
            open_parts = empty if int((part_of < 0).sum()) <= len(empty) else range(parts)
            part_of[group] = max(
                rng.permutation(open_parts), key=lambda part: (*lacking[part, [rarest, -1]],)
            )
            lacking[part_of[group]] -= sizes[group]
    return part_of[groups]
