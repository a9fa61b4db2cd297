"""Tensor names as tables that are read both ways: published name on the left, ours on the right.

A rule stands for a module's weight and bias alike, and for every block by `<i>`. Three kinds: a plain string renames;
`concat` lays several of our tensors one below the other; `grouped` lays q, k and v of each key-value group together:
`[q_1 .. q_r, k, v]` times the number of groups.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from litgpt.errors import UserError
from litgpt.model.config import Config

if TYPE_CHECKING:  # names alone need no torch
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One published tensor and the tensors of ours that it holds, in order."""

    theirs: str
    ours: tuple[str, ...]
    kind: str

    def split(self, tensor: "Tensor", config: Config) -> "list[Tensor]":
        """Our tensors out of the published one: views where the layout allows it.

        Raises:
            UserError: if the tensor has not the number of rows that the shape asks for.
        """
        if self.kind == "rename":
            return [tensor]
        rows = [rows_of(config, name) for name in self.ours]
        if tensor.shape[0] != sum(rows):
            raise UserError(f"{self.theirs}: {tensor.shape[0]} rows, but the model's shape asks for {sum(rows)}")
        if self.kind == "concat":
            return list(tensor.split(rows))
        groups, each = group_sizes(config)
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(each, dim=1)]

    def join(self, tensors: "list[Tensor]", config: Config) -> "Tensor":
        """The published tensor out of ours, which are given in the order of `ours`."""
        import torch

        if self.kind == "rename":
            return tensors[0]
        if self.kind == "concat":
            return torch.cat(tensors)
        groups, _ = group_sizes(config)
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def group_sizes(config: Config) -> tuple[int, list[int]]:
    """The number of key-value groups, and the rows of q, k and v in each."""
    assert config.head_size is not None and config.n_query_groups is not None
    queries = config.n_head // config.n_query_groups
    return config.n_query_groups, [queries * config.head_size, config.head_size, config.head_size]


def rows_of(config: Config, name: str) -> int:
    """The rows of one of our tensors that a published tensor may hold with others."""
    assert config.intermediate_size is not None
    groups, (queries, keys, values) = group_sizes(config)
    part = name.split(".")[-2]
    return {"q": groups * queries, "k": groups * keys, "v": groups * values}.get(part, config.intermediate_size)


@dataclass(frozen=True)
class Rule:
    """One line of a table: a published pattern, our patterns, how they are laid out, and for which shapes it holds."""

    theirs: str
    ours: tuple[str, ...]
    kind: str
    when: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, config: Config) -> bool:
        return all(getattr(config, key) in values for key, values in self.when.items())

    def step(self, pattern: str, name: str) -> Step | None:
        """The step for a tensor named `name` if `pattern` fits it."""
        found = re.fullmatch(re.escape(pattern).replace("<i>", r"(\d+)") + r"\.(weight|bias)", name)
        if found is None:
            return None
        *layer, kind = found.groups()

        def fill(text: str) -> str:
            return f"{text.replace('<i>', layer[0] if layer else '')}.{kind}"

        return Step(fill(self.theirs), tuple(fill(ours) for ours in self.ours), self.kind)


@dataclass(frozen=True)
class Table:
    """All rules of one naming; where two hold for a tensor of ours, the first is the one that is written."""

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def reading(self, published: Iterable[str], config: Config) -> list[Step]:
        """How to turn tensors of these published names into ours; buffers that only the publisher keeps are left out.

        Raises:
            UserError: naming a tensor that no rule knows.
        """
        wanted = [name for name in published if not any(re.fullmatch(pattern, name) for pattern in self.ignored)]
        return [self._find_theirs(name, config) for name in wanted]

    def writing(self, ours: Iterable[str], config: Config) -> list[Step]:
        """How to make the published tensors out of those of ours that have these names.

        Raises:
            UserError: naming a tensor that no rule knows, or one that is missing beside another.
        """
        names = list(ours)
        steps = {step.theirs: step for name in names for step in [self._find_ours(name, config)]}
        missing = {name for step in steps.values() for name in step.ours} - set(names)
        if missing:
            raise UserError(f"{min(missing)}: missing, but {self.name} stores it in one tensor with others")
        return list(steps.values())

    def _find_ours(self, name: str, config: Config) -> Step:
        for rule in self.rules:
            for pattern in rule.ours:
                step = rule.step(pattern, name)
                if step and rule.holds(config):
                    return step
        raise UserError(f"{name}: {self.name} has no name for this tensor; keep it under its own name")

    def _find_theirs(self, name: str, config: Config) -> Step:
        for rule in self.rules:
            step = rule.step(rule.theirs, name)
            if step and rule.holds(config):
                return step
        raise UserError(f"{name}: no tensor of this name in the {self.name} family; is it of another architecture?")


def table(name: str, lines: Mapping[str, Any], ignored: Iterable[str] = ()) -> Table:
    """A table out of its YAML form: `theirs: ours`, or `theirs: {concat: [ours, ...], when: {field: [value]}}`."""
    rules = []
    for theirs, line in lines.items():
        entry: dict[str, Any] = {"rename": [line]} if isinstance(line, str) else dict(line)
        when: dict[str, Any] = entry.pop("when", {})
        ((kind, ours),) = entry.items()
        rules.append(Rule(theirs, tuple(ours), kind, when))
    return Table(name, tuple(rules), tuple(ignored))


def to_ours(names: Table, published: "Mapping[str, Tensor]", config: Config) -> "dict[str, Tensor]":
    """A published state dict under our names; exact, and views where the layout allows it.

    Raises:
        UserError: naming a tensor without a rule, of the wrong size, or a head that differs from the embedding it is
            tied to.
    """
    ours: dict[str, Tensor] = {}
    for step in names.reading(published, config):
        ours.update(zip(step.ours, step.split(published[step.theirs], config), strict=True))
    head = ours.pop("head.weight", None) if config.tie_embeddings else None
    if head is not None and not head.equal(ours["embedding.weight"]):
        raise UserError("tie_embeddings: true, but the head's weight is not the embedding's; set it to false")
    return ours


def to_published(names: Table, ours: "Mapping[str, Tensor]", config: Config) -> "dict[str, Tensor]":
    """Our state dict under published names; exact.

    Raises:
        UserError: naming a tensor without a rule.
    """
    steps = names.writing(ours, config)
    return {step.theirs: step.join([ours[name] for name in step.ours], config) for step in steps}
