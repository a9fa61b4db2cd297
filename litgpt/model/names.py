"""Tensor names as tables that are read both ways: published name on the left, ours on the right.

A rule stands for a module's weight and bias alike, and for every block by `<i>`; names without `.weight` or `.bias` are
written out in full. A plain string renames. `concat` lays several of our tensors one below the other, `interleaved`
row by row in turn, `grouped` lays q, k and v of each key-value group together: `[q_1 .. q_r, k, v]` times the number of
groups; `row` is a vector published as a matrix of one row. `transposed: true` says that matrices are published as
(in, out). `<e>` in the published name stands for every expert, whose tensors ours holds stacked.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from litgpt.errors import UserError
from litgpt.model.transformer_config import TransformerConfig

if TYPE_CHECKING:  # names alone need no torch
    from torch import Tensor

KINDS = ("rename", "concat", "grouped", "interleaved", "row")


@dataclass(frozen=True)
class TensorMapping:
    """One published tensor and the tensors of ours that it holds, in order; with `expert`, that slice of each."""

    hf_name: str
    names: tuple[str, ...]
    kind: str
    expert: int | None = None
    transposed: bool = False

    def split(self, tensor: "Tensor", config: TransformerConfig) -> "list[Tensor]":
        """Our tensors (with `expert`, that slice of each) out of the published one: views where the layout allows it.

        Raises:
            UserError: if the tensor has not the number of dims or rows that the shape asks for.
        """
        if tensor.dim() < self._least_dims:
            raise UserError(f"{self.hf_name}: {list(tensor.shape)}, but {self._least_dims} dims are needed")
        if self._turned:
            tensor = tensor.mT
        if self.kind == "rename":
            return [tensor]
        rows = [1] if self.kind == "row" else [count_rows(config, name) for name in self.names]
        if tensor.shape[self._dim] != sum(rows):
            found = tensor.shape[self._dim]
            raise UserError(f"{self.hf_name}: {found} rows, but the model's shape asks for {sum(rows)}")
        if self.kind == "row":
            return [tensor[0]]
        if self.kind == "concat":
            return list(tensor.split(rows, dim=self._dim))
        if self.kind == "interleaved":
            return list(tensor.unflatten(self._dim, (-1, len(self.names))).unbind(self._dim + 1))
        groups, each = group_sizes(config)
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(each, dim=1)]

    def join(self, tensors: "list[Tensor]", config: TransformerConfig) -> "Tensor":
        """The published tensor out of ours, which are given whole and in the order of `ours`."""
        parts = tensors if self.expert is None else [tensor[self.expert] for tensor in tensors]
        joined = self._joined(parts, config)
        return joined.mT.contiguous() if self._turned else joined

    def _joined(self, parts: "list[Tensor]", config: TransformerConfig) -> "Tensor":
        import torch

        if self.kind == "rename":
            return parts[0]
        if self.kind == "row":
            return parts[0][None]
        if self.kind == "concat":
            return torch.cat(parts, dim=self._dim)
        if self.kind == "interleaved":
            return torch.stack(parts, dim=self._dim + 1).flatten(self._dim, self._dim + 1)
        groups, _ = group_sizes(config)
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    @property
    def _turned(self) -> bool:
        return self.transposed and not self.names[0].endswith("bias")

    @property
    def _dim(self) -> int:
        """The dim of rows: experts that are published stacked come before it."""
        return int(is_stacked(self.names[0]) and self.expert is None)

    @property
    def _least_dims(self) -> int:
        return max(2 * self._turned, 0 if self.kind == "rename" else self._dim + 1)


def is_stacked(ours: str) -> bool:
    """Whether one of our tensors holds one slice for every expert, as its name says."""
    return ".experts." in ours


def group_sizes(config: TransformerConfig) -> tuple[int, list[int]]:
    """The number of key-value groups, and the rows of q, k and v in each."""
    assert config.head_size is not None and config.n_query_groups is not None
    queries = config.n_head // config.n_query_groups
    return config.n_query_groups, [queries * config.head_size, config.head_size, config.head_size]


def count_rows(config: TransformerConfig, name: str) -> int:
    """The rows of one of our tensors that a published tensor may hold with others."""
    assert config.intermediate_size is not None
    if is_stacked(name):
        return config.expert_size
    if ".shared." in name:
        return config.shared_size
    groups, (queries, keys, values) = group_sizes(config)
    part = name.split(".")[-2]
    return {"q": groups * queries, "k": groups * keys, "v": groups * values}.get(part, config.intermediate_size)


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """What fits a pattern of a table: numbers for `<i>` and `<e>`, then the ending of a weight, a bias or nothing."""
    numbered = re.escape(pattern).replace("<i>", r"(?P<i>\d+)").replace("<e>", r"(?P<e>\d+)")
    return re.compile(numbered + r"(?P<ending>\.weight|\.bias|)")


@dataclass(frozen=True)
class NameRule:
    """One line of a table: a published pattern, our patterns, how they are laid out, and for which shapes it holds."""

    hf_name: str
    names: tuple[str, ...]
    kind: str
    when: Mapping[str, Any] = field(default_factory=dict)
    transposed: bool = False

    def applies_to(self, config: TransformerConfig) -> bool:
        return all(getattr(config, key) in values for key, values in self.when.items())

    def map_hf_names(self, name: str) -> TensorMapping | None:
        """The step for the published tensor of this name if the rule knows it."""
        found = compile_pattern(self.hf_name).fullmatch(name)
        return None if found is None else self._step(found.groupdict())

    def map_names(self, name: str, config: TransformerConfig) -> list[TensorMapping]:
        """The steps that publish our tensor of this name: one, one for every expert, or none if it is no such name."""
        for pattern in self.names:
            if found := compile_pattern(pattern).fullmatch(name):
                experts = range(config.n_expert) if "<e>" in self.hf_name else [None]
                return [self._step({**found.groupdict(), "e": expert}) for expert in experts]
        return []

    def _step(self, values: Mapping[str, Any]) -> TensorMapping:
        layer, expert, ending = values.get("i"), values.get("e"), values["ending"]

        def fill(text: str) -> str:
            return text.replace("<i>", layer or "").replace("<e>", str(expert)) + ending

        number = None if expert is None else int(expert)
        return TensorMapping(fill(self.hf_name), tuple(map(fill, self.names)), self.kind, number, self.transposed)


@dataclass(frozen=True)
class NameTable:
    """All rules of one naming; where two hold for a tensor of ours, the first is the one that is written.

    `ignored` are patterns of buffers that say nothing, `unread` those of parts that the model has not, `<beyond>` in
    them the number of a layer after the last. `starts` maps what a published name may start with to what rules call it.
    """

    name: str
    rules: tuple[NameRule, ...]
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    starts: Mapping[str, str] = field(default_factory=dict)

    def map_hf_names(self, published: Iterable[str], config: TransformerConfig) -> list[TensorMapping]:
        """How to turn tensors of these published names into ours, without those that are `ignored` or `unread`.

        Raises:
            UserError: naming a tensor that no rule knows, or an expert that is missing or too many.
        """
        names = list(published)
        left_out = {name for name in names if self._fits(name, self.ignored, config)}
        left_out.update(self.left_unread(names, config))
        steps = [self._find_theirs(name, config) for name in names if name not in left_out]
        check_experts(steps, config)
        return steps

    def step(self, published: str, config: TransformerConfig) -> TensorMapping | None:
        """What one published tensor becomes; None if no rule knows it."""
        try:
            return self._find_theirs(published, config)
        except UserError:
            return None

    def ignores(self, published: str, config: TransformerConfig) -> bool:
        """Whether a published tensor is a buffer that says nothing."""
        return self._fits(published, self.ignored, config)

    def left_unread(self, published: Iterable[str], config: TransformerConfig) -> list[str]:
        """The published tensors that hold weights which the model has no place for."""
        return [name for name in published if self._fits(name, self.unread, config)]

    def map_names(self, ours: Iterable[str], config: TransformerConfig) -> list[TensorMapping]:
        """How to make the published tensors out of those of ours that have these names.

        Raises:
            UserError: naming a tensor that no rule knows, or one that is missing beside another.
        """
        names = list(ours)
        steps = {step.hf_name: step for name in names for step in self._find_ours(name, config)}
        missing = {name for step in steps.values() for name in step.names} - set(names)
        if missing:
            raise UserError(f"{min(missing)}: missing, but {self.name} stores it in one tensor with others")
        return list(steps.values())

    def _find_ours(self, name: str, config: TransformerConfig) -> list[TensorMapping]:
        for rule in self.rules:
            if rule.applies_to(config) and (steps := rule.map_names(name, config)):
                return steps
        raise UserError(f"{name}: {self.name} has no name for this tensor; keep it under its own name")

    def _find_theirs(self, name: str, config: TransformerConfig) -> TensorMapping:
        for called in self._callings(name):
            for rule in self.rules:
                step = rule.map_hf_names(called)
                if step and rule.applies_to(config):
                    return replace(step, hf_name=name)
        raise UserError(f"{name}: no tensor of this name in the {self.name} family; is it of another architecture?")

    def _callings(self, name: str) -> list[str]:
        """The name itself, then the names that the rules may know it by."""
        return [name, *(ours + name[len(start) :] for start, ours in self.starts.items() if name.startswith(start))]

    def _fits(self, name: str, patterns: Iterable[str], config: TransformerConfig) -> bool:
        for pattern in patterns:
            for called in self._callings(name):
                found = re.fullmatch(pattern.replace("<beyond>", r"(?P<beyond>\d+)"), called)
                if found and int(found.groupdict().get("beyond", config.n_layer)) >= config.n_layer:
                    return True
        return False


def check_experts(steps: Iterable[TensorMapping], config: TransformerConfig) -> None:
    """Refuse a set of tensors in which an expert is missing, or has a number that the shape has not."""
    found: dict[tuple[str, ...], dict[int | None, str]] = defaultdict(dict)
    for step in steps:
        if is_stacked(step.names[0]):
            found[step.names][step.expert] = step.hf_name
    whole = set(range(config.n_expert))
    for experts in found.values():
        if experts.keys() == {None} or experts.keys() == whole:
            continue
        if extra := experts.keys() - whole:
            number = next(iter(extra))
            raise UserError(f"{experts[number]}: beside the experts of a model of {config.n_expert}; check n_expert")
        first = min(whole - experts.keys())
        raise UserError(f"{next(iter(experts.values()))}: there, but not that of expert {first} of {config.n_expert}")


def build_table(
    name: str,
    lines: Mapping[str, Any],
    ignored: Iterable[str] = (),
    *,
    unread: Iterable[str] = (),
    prefix: str = "",
    starts: Mapping[str, str] | None = None,
) -> NameTable:
    """A table out of its YAML form: `theirs: ours`, or `theirs: {concat: [ours, ...], when: {field: [value]}}`.

    Args:
        prefix: what names lack in the file of a model without head; short for `starts: {'': prefix}`.
    """
    rules = []
    for theirs, line in lines.items():
        entry: dict[str, Any] = {"rename": [line]} if isinstance(line, str) else dict(line)
        when, transposed = entry.pop("when", {}), entry.pop("transposed", False)
        ((kind, ours),) = entry.items()
        assert kind in KINDS, f"{name}: {theirs}: {kind}"
        rules.append(NameRule(theirs, tuple(ours), kind, when, transposed))
    known = {**({"": prefix} if prefix else {}), **(starts or {})}
    return NameTable(name, tuple(rules), tuple(ignored), tuple(unread), known)


def to_our_names(names: NameTable, published: "Mapping[str, Tensor]", config: TransformerConfig) -> "dict[str, Tensor]":
    """A published state dict under our names; exact, and views where the layout allows it.

    Raises:
        UserError: naming a tensor without a rule, of the wrong size, or a head that differs from the embedding it is
            tied to.
    """
    import torch

    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for step in names.map_hf_names(published, config):
        for name, part in zip(step.names, step.split(published[step.hf_name], config), strict=True):
            if step.expert is None:
                ours[name] = part
            else:
                stacks[name][step.expert] = part
    for name, parts in stacks.items():
        ours[name] = torch.stack([parts[expert] for expert in range(config.n_expert)])
    head = ours.pop("head.weight", None) if config.tie_embeddings else None
    if head is not None and not head.equal(ours["embedding.weight"]):
        raise UserError("tie_embeddings: true, but the head's weight is not the embedding's; set it to false")
    return ours


def to_hf_names(names: NameTable, ours: "Mapping[str, Tensor]", config: TransformerConfig) -> "dict[str, Tensor]":
    """Our state dict under published names; exact.

    Raises:
        UserError: naming a tensor without a rule.
    """
    steps = names.map_names(ours, config)
    return {step.hf_name: step.join([ours[name] for name in step.names], config) for step in steps}
