"""Which label each category of an annotation file has."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from boxteacher.data.problems import Problem


@dataclass(frozen=True)
class Categories:
    """The categories of an annotation file.

    Attributes:
        file: annotation file.
        names: name of each category id, in ascending order of the ids.
        groupings: ids of the categories that are the supercategory of others.
        objects: number of annotations of each category id.
    """

    file: Path
    names: dict[int, str]
    groupings: set[int]
    objects: Counter[int]

    def warning(self, what: str, remedy: str) -> Problem:
        """A warning about the categories."""
        return Problem(self.file, "categories", what, remedy, "warning")


def choose_classes(categories: Categories) -> tuple[dict[int, str], list[Problem]]:
    """Names of the classes to train on by category id: all but groupings that no annotation uses.

    Roboflow, for one, writes such a grouping as the first category.

    Returns:
        The classes, and a warning for every grouping that is left out.
    """
    names, objects = categories.names, categories.objects
    unused = [each for each in categories.groupings if not objects[each]]
    problems = []
    for each in unused:
        what = f"{names[each]!r} (id {each}) groups others and has 0 of {objects.total()} annotations"
        problems.append(categories.warning(what, "it is left out of the classes"))
    return {each: name for each, name in names.items() if each not in unused}, problems


def match_classes(categories: Categories, classes: Mapping[int, str]) -> tuple[dict[int, int], list[Problem]]:
    """Label of each category id that a model knows, by name.

    Names that differ in case or spaces alone are the same, unless the file or the model tells them apart. If
    no name is the model's, but the ids are, the categories are taken as renamed and matched by id. Never are
    some matched by id beside others by name: in another numbering the ids mean other classes.

    Args:
        categories: categories of the file.
        classes: names of the model's classes by category id, in the order of its labels.

    Returns:
        The labels, and a problem for each way in which the categories of the file's annotations differ from
        the model's: an error if the model lacks one, else warnings.
    """
    category_ids, class_names = list(classes), list(classes.values())
    label_of = _match_names(categories.names, classes)
    by_name = bool(label_of)
    if not by_name and choose_classes(categories)[0].keys() == classes.keys():
        label_of = {each: label for label, each in enumerate(category_ids)}
    return label_of, list(_differences(categories, label_of, category_ids, class_names, by_name))


def _match_names(names: Mapping[int, str], classes: Mapping[int, str]) -> dict[int, int]:
    label_of: dict[int, int] = {}
    for spelling in (str, _normalized):
        ids_of: dict[str, list[int]] = {}
        for each, name in names.items():
            if each not in label_of:
                ids_of.setdefault(spelling(name), []).append(each)
        matched = set(label_of.values())
        open_classes = [
            (label, category_id, spelling(name))
            for label, (category_id, name) in enumerate(classes.items())
            if label not in matched
        ]
        times = Counter(name for _, _, name in open_classes)
        for label, category_id, name in open_classes:
            same_name = ids_of.get(name, [])
            if category_id in same_name:
                label_of[category_id] = label
            elif len(same_name) == times[name] == 1:
                label_of[same_name[0]] = label
    return label_of


def _normalized(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def _differences(
    categories: Categories,
    label_of: dict[int, int],
    category_ids: list[int],
    class_names: list[str],
    by_name: bool,
) -> Iterator[Problem]:
    names, objects = categories.names, categories.objects

    def count(ids: Iterable[int]) -> str:
        return f"{sum(objects[each] for each in ids)} of {objects.total()} annotations"

    used = {each: label for each, label in label_of.items() if objects[each]}
    renumbered = {each: label for each, label in used.items() if each != category_ids[label]}
    renamed = {} if by_name else used
    unknown = [each for each in names if each not in label_of and objects[each]]
    if renumbered:
        pairs = [f"{names[each]} is {each}, not {category_ids[label]}" for each, label in renumbered.items()]
        what = f"{count(renumbered)} have another category id than in training ({_few(pairs)})"
        yield categories.warning(what, "they are matched by name")
    if renamed:
        pairs = [f"{each} is {names[each]}, not {class_names[label]}" for each, label in renamed.items()]
        what = f"{count(renamed)} have another category name than in training ({_few(pairs)})"
        yield categories.warning(what, "they are matched by id")
    if unknown:
        listed = _few([f"{names[each]} (id {each})" for each in unknown])
        what = f"{count(unknown)} have a category that training does not: {listed}"
        remedy = "rename it, add it to the training split, or remove its annotations"
        yield Problem(categories.file, "categories", what, remedy)


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:5]) + (", …" if len(texts) > 5 else "")
