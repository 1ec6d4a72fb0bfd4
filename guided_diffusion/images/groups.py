"""The patients of radiographs as --group states them, and otherwise as the files tell."""

import os
import re
from collections.abc import Mapping, Sequence

from guided_diffusion.images.names import composed, spellings, stem
from guided_diffusion.images.patients import find_patients
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_table


def patients_of(names: Sequence[str], paths: Sequence[str], rule: str) -> tuple[list[int], str]:
    """Of each radiograph, the index of the first one of the same patient; and how that is known.

    :param names: see `patients.find_patients`; `paths` too.
    :param rule: --group, see `read_groups`; "": as the files tell.
    :return: the sentence is "" where the rule says it.
    """
    if rule:
        first: dict[str, int] = {}
        groups = read_groups(names, rule)
        return [first.setdefault(group, n) for n, group in enumerate(groups)], ""
    patients = find_patients(names, paths)
    if patients.known:
        return patients.groups, f"{patients.said}; --group states it yourself"
    return patients.groups, (
        "warning: nothing tells which images are of one patient, so several of one may be chosen;"
        " --group states it"
    )


def read_groups(names: Sequence[str], rule: str) -> list[str]:
    """The group (patient) of each name.

    :param rule: "" to make each name a group of its own; a CSV file of lines NAME,GROUP; or a
        regular expression, of which the first capture group, or else the whole match, is the group.
    :raises UserError: if the rule is invalid or leaves a name without a group.
    """
    if not rule:
        return list(names)
    if rule.lower().endswith(".csv"):
        return _groups_from_csv(names, rule)
    try:
        pattern = re.compile(composed(rule))
    except re.error as error:
        raise UserError(f"--group {rule}: not a regular expression ({error})") from error
    groups, missing = [], []
    for name in names:
        match = pattern.search(name)
        if match:
            groups.append((match.group(1) or "") if pattern.groups else match.group())
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"--group {rule} matches nothing in {len(missing)} of {len(names)} names: "
            + ", ".join(missing[:5])
        )
    return groups


def _groups_from_csv(names: Sequence[str], path: str) -> list[str]:
    if not os.path.isfile(path):
        raise UserError(f"--group {path} does not exist")
    group_of: dict[str, str] = {}
    for row in read_table(path):
        if len(row) >= 2:
            listed, group = composed(row[0]), composed(row[1])
            if group_of.setdefault(listed, group) != group:
                raise UserError(
                    f"--group {path} lists {listed} with the groups {group_of[listed]} and {group}"
                )
            group_of.setdefault(stem(listed), group)
    groups = [_look_up(group_of, name) or _look_up(group_of, name.split("/")[-1]) for name in names]
    missing = [name for name, group in zip(names, groups) if not group]
    if missing:
        raise UserError(
            f"--group {path} has no group for {len(missing)} of {len(names)} names: "
            + ", ".join(missing[:5])
        )
    return groups


def _look_up(group_of: Mapping[str, str], name: str) -> str:
    return next((group_of[text] for text in spellings(name) if text in group_of), "")
