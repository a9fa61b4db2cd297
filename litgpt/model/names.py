"""Tables of tensor names, used in both directions: the published name (`hf_name`) and the model's (`name`).

A rule applies to both weight and bias of a module, and to every block by `<i>`; names without `.weight` or `.bias` are
written in full. A plain string renames. `concat` concatenates several tensors of the model along rows, `interleaved`
alternates their rows, `grouped` concatenates q, k and v of each key-value group: `[q_1 .. q_r, k, v]` times the number
of groups; `row` is a vector published as a matrix of one row, or a matrix with a first dim of one, `token` a vector
published with two dims of one before it, `padded` has further rows after those of the model's vocabulary, `flattened`
is the kernel of a convolution over patches, or over blocks of them, published with a dim for each of its axes. With
`transposed: true`, matrices are published as (in, out), with `transposed: either` as (in, out) or (out, in): they are
written as the first, unless both have the same shape. `<e>` in the published name stands for every expert; the model
has the tensors of all experts stacked.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from litgpt.errors import UserError
from litgpt.model.transformer_config import TransformerConfig

if TYPE_CHECKING:  # names alone need no torch
    from torch import Tensor

Transposed = bool | Literal["either"]
MAPPING_KINDS = ("rename", "concat", "grouped", "interleaved", "row", "token", "padded", "flattened")
NO_SUCH_PART, NO_WEIGHTS = "the model has no such part", "holds no weights"  # why a tensor is not read
CARRIED = "is of a part that is only written back"


@dataclass(frozen=True)
class TensorMapping:
    """A published tensor and the tensors of the model that it contains, in order; with `expert`, that slice of each."""

    hf_name: str
    names: tuple[str, ...]
    kind: str
    expert: int | None = None
    transposed: Transposed = False

    def split(self, tensor: "Tensor", config: TransformerConfig) -> "list[Tensor]":
        """Split a published tensor into those of the model (with `expert`, slices of them), as views where possible.

        Raises:
            UserError: if the tensor does not have the dims or rows of the model's shape.
        """
        if tensor.dim() < self._least_dims:
            raise UserError(f"{self.hf_name}: {list(tensor.shape)}, but {self._least_dims} dims are needed")
        if self._is_transposed(config, tensor.shape):
            tensor = tensor.mT
        if self.kind == "rename":
            return [tensor]
        if self.kind == "padded":
            return [tensor[: config.padded_vocab_size]]
        if self.kind == "flattened":
            return [tensor.flatten(1) if self._is_kernel else tensor]
        rows = [1] if self.kind in ("row", "token") else [count_tensor_rows(config, name) for name in self.names]
        if tensor.shape[self._dim] != sum(rows):
            raise UserError(f"{self.hf_name}: {tensor.shape[self._dim]} rows, but the model needs {sum(rows)}")
        if self.kind == "row":
            return [tensor[0]]
        if self.kind == "token":
            return [tensor[0, 0]]
        if self.kind == "concat":
            return list(tensor.split(rows, dim=self._dim))
        if self.kind == "interleaved":
            return list(tensor.unflatten(self._dim, (-1, len(self.names))).unbind(self._dim + 1))
        groups, sizes = group_sizes(config)
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(sizes, dim=1)]

    def join(self, tensors: "list[Tensor]", config: TransformerConfig) -> "Tensor":
        """Join the model's tensors, which are whole and in the order of `names`, into the published one."""
        return self.join_parts(tensors if self.expert is None else [tensor[self.expert] for tensor in tensors], config)

    def join_parts(self, parts: "list[Tensor]", config: TransformerConfig) -> "Tensor":
        """Join what `split` returns into the published tensor."""
        joined = self._join_rows(parts, config)
        published = (*joined.shape[:-2], *joined.shape[:-3:-1])
        return joined.mT.contiguous() if self._is_transposed(config, published) else joined

    def _join_rows(self, parts: "list[Tensor]", config: TransformerConfig) -> "Tensor":
        import torch

        if self.kind in ("rename", "padded"):
            return parts[0]
        if self.kind == "row":
            return parts[0][None]
        if self.kind == "token":
            return parts[0][None, None]
        if self.kind == "flattened":
            return parts[0].unflatten(1, kernel_sizes(config, self.names[0])) if self._is_kernel else parts[0]
        if self.kind == "concat":
            return torch.cat(parts, dim=self._dim)
        if self.kind == "interleaved":
            return torch.stack(parts, dim=self._dim + 1).flatten(self._dim, self._dim + 1)
        groups, _ = group_sizes(config)
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def _is_transposed(self, config: TransformerConfig, shape: Sequence[int]) -> bool:
        """Whether a published tensor of a shape has matrices (in, out)."""
        if self.transposed == "either":
            return shape[-1] != count_expert_columns(config, self.names[0])
        return self.transposed and not self.names[0].endswith("bias")

    @property
    def _is_kernel(self) -> bool:
        return not self.names[0].endswith("bias")

    @property
    def _dim(self) -> int:
        """The dim of rows, after that of experts if they are published stacked."""
        return int(is_stacked(self.names[0]) and self.expert is None)

    @property
    def _least_dims(self) -> int:
        return max(2 * bool(self.transposed and self._is_kernel), 0 if self.kind == "rename" else self._dim + 1)


def is_stacked(name: str) -> bool:
    """Whether a tensor of the model has one slice for every expert, by its name."""
    return ".experts." in name


def group_sizes(config: TransformerConfig) -> tuple[int, list[int]]:
    """The number of key-value groups, and the rows of q, k and v in each."""
    assert config.head_size is not None and config.n_query_groups is not None
    queries = config.n_head // config.n_query_groups
    return config.n_query_groups, [queries * config.head_size, config.head_size, config.head_size]


def kernel_sizes(config: TransformerConfig, name: str) -> tuple[int, ...]:
    """The dims of a published kernel over patches, or over blocks of them: channels, frames if several, two sides."""
    assert config.vision is not None
    if not name.startswith("vision.patches."):
        return (config.vision["width"], config.vision["merge"], config.vision["merge"])
    channels, frames, side = (config.vision[key] for key in ("channels", "temporal", "patch"))
    return (channels, side, side) if frames == 1 else (channels, frames, side, side)


def count_tensor_rows(config: TransformerConfig, name: str) -> int:
    """The rows of a tensor of the model that a published tensor may contain with others."""
    if name.startswith("vision."):
        assert config.vision is not None
        return int(config.vision["width"])
    assert config.intermediate_size is not None
    if is_stacked(name):
        return config.expert_size
    if ".shared." in name:
        return config.shared_size
    groups, (queries, keys, values) = group_sizes(config)
    part = name.split(".")[-2]
    return {"q": groups * queries, "k": groups * keys, "v": groups * values}.get(part, config.intermediate_size)


def count_expert_columns(config: TransformerConfig, name: str) -> int:
    """The size of the inputs of a stack of matrices, one for each expert."""
    return config.expert_size if name.endswith(".down") else config.n_embd


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern: numbers for `<i>` and `<e>`, then `.weight`, `.bias` or nothing."""
    numbered = re.escape(pattern).replace("<i>", r"(?P<i>\d+)").replace("<e>", r"(?P<e>\d+)")
    return re.compile(numbered + r"(?P<ending>\.weight|\.bias|)")


@dataclass(frozen=True)
class NameRule:
    """A line of a table: a published pattern, patterns of the model, their layout, and which configs it applies to."""

    hf_name: str
    names: tuple[str, ...]
    kind: str
    when: Mapping[str, Any] = field(default_factory=dict)
    transposed: Transposed = False

    def applies_to(self, config: TransformerConfig) -> bool:
        """Whether a model of this config has the tensors of the rule."""
        return all(getattr(config, key) in values for key, values in self.when.items())

    def map_hf_name(self, hf_name: str) -> TensorMapping | None:
        """The mapping of a published name; None if the rule does not match it."""
        match = compile_pattern(self.hf_name).fullmatch(hf_name)
        return None if match is None else self._fill(match.groupdict())

    def map_name(self, name: str, config: TransformerConfig) -> list[TensorMapping]:
        """The mappings of a name of the model: one, one for every expert, or none if the rule does not match it."""
        for pattern in self.names:
            if match := compile_pattern(pattern).fullmatch(name):
                experts = range(config.n_expert) if "<e>" in self.hf_name else [None]
                return [self._fill({**match.groupdict(), "e": expert}) for expert in experts]
        return []

    def _fill(self, values: Mapping[str, Any]) -> TensorMapping:
        layer, expert, ending = values.get("i"), values.get("e"), values["ending"]

        def fill(pattern: str) -> str:
            return pattern.replace("<i>", layer or "").replace("<e>", str(expert)) + ending

        number = None if expert is None else int(expert)
        return TensorMapping(fill(self.hf_name), tuple(map(fill, self.names)), self.kind, number, self.transposed)


@dataclass(frozen=True)
class NameTable:
    """All rules of one naming; if several apply to a tensor of the model, the first is used for writing.

    `ignored` are patterns of buffers without weights, `unread` those of parts that the model does not have, `carried`
    those of parts that are written back as they came; `<beyond>` is the number of a layer after the last. `starts` maps
    prefixes of published names to those in the rules. `copies` are published names with the number `<i>` of a
    prediction layer, and the tensors of the model that they repeat.
    """

    name: str
    rules: tuple[NameRule, ...]
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    starts: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def map_hf_name(self, hf_name: str, config: TransformerConfig) -> TensorMapping | None:
        """The mapping of a published name; None if no rule matches it."""
        for alias in self._list_aliases(hf_name):
            for rule in self.rules:
                mapping = rule.map_hf_name(alias)
                if mapping and rule.applies_to(config):
                    return replace(mapping, hf_name=hf_name)
        return None

    def get_skip_reason(self, hf_name: str, config: TransformerConfig) -> str:
        """Why a published tensor is not read, `NO_SUCH_PART`, `CARRIED` or `NO_WEIGHTS`; empty if it is read."""
        if self._matches(hf_name, self.unread, config):
            return NO_SUCH_PART
        if self._matches(hf_name, self.carried, config):
            return CARRIED
        return NO_WEIGHTS if self._matches(hf_name, self.ignored, config) else ""

    def map_names(self, names: Iterable[str], config: TransformerConfig) -> list[TensorMapping]:
        """The mappings to publish the tensors of the model that have these names.

        Raises:
            UserError: naming a tensor that no rule matches, or one that is missing from a joined tensor.
        """
        names = list(names)
        mappings = {mapping.hf_name: mapping for name in names for mapping in self._map_name(name, config)}
        missing = {name for mapping in mappings.values() for name in mapping.names} - set(names)
        if missing:
            raise UserError(f"{min(missing)}: missing, but {self.name} stores it in one tensor with others")
        return list(mappings.values())

    def list_copies(self, config: TransformerConfig) -> list[TensorMapping]:
        """The mappings of tensors of the model that are published again in every prediction layer, which share them."""
        tied = {"head.weight": "embedding.weight"} if config.tie_embeddings else {}
        return [
            TensorMapping(hf_name.replace("<i>", str(layer)), (tied.get(name, name),), "rename")
            for layer in range(config.n_layer, config.n_blocks)
            for hf_name, name in self.copies.items()
        ]

    def _map_name(self, name: str, config: TransformerConfig) -> list[TensorMapping]:
        for rule in self.rules:
            if rule.applies_to(config) and (mappings := rule.map_name(name, config)):
                return mappings
        raise UserError(f"{name}: {self.name} has no name for this tensor; keep it under its own name")

    def _list_aliases(self, hf_name: str) -> list[str]:
        """The name itself, then the names that rules may match instead."""
        starts = self.starts.items()
        return [hf_name, *(alias + hf_name[len(start) :] for start, alias in starts if hf_name.startswith(start))]

    def _matches(self, hf_name: str, patterns: Iterable[str], config: TransformerConfig) -> bool:
        patterns = [pattern.replace("<beyond>", r"(?P<beyond>\d+)") for pattern in patterns]
        matches = (re.fullmatch(*pair) for pair in product(patterns, self._list_aliases(hf_name)))
        return any(m and int(m.groupdict().get("beyond", config.n_blocks)) >= config.n_blocks for m in matches)


def build_name_table(
    name: str,
    lines: Mapping[str, Any],
    ignored: Iterable[str] = (),
    *,
    unread: Iterable[str] = (),
    carried: Iterable[str] = (),
    prefix: str = "",
    starts: Mapping[str, str] | None = None,
    copies: Mapping[str, str] | None = None,
) -> NameTable:
    """Build a table from its YAML form: `hf_name: name`, or `hf_name: {concat: [name, ...], when: {field: [value]}}`.

    Args:
        prefix: prefix that names lack in the file of a model without head; short for `starts: {'': prefix}`.
        copies: as in `NameTable`.
    """
    rules = []
    for hf_name, line in lines.items():
        entry: dict[str, Any] = {"rename": [line]} if isinstance(line, str) else dict(line)
        when, transposed = entry.pop("when", {}), entry.pop("transposed", False)
        ((kind, names),) = entry.items()
        assert kind in MAPPING_KINDS, f"{name}: {hf_name}: {kind}"
        rules.append(NameRule(hf_name, tuple(names), kind, when, transposed))
    aliases = {**({"": prefix} if prefix else {}), **(starts or {})}
    skipped = {"ignored": tuple(ignored), "unread": tuple(unread), "carried": tuple(carried)}
    return NameTable(name, tuple(rules), **skipped, starts=aliases, copies=copies or {})


def to_hf_names(table: NameTable, tensors: "Mapping[str, Tensor]", config: TransformerConfig) -> "dict[str, Tensor]":
    """Rename and join the tensors of a state dict to the published ones; exact.

    Raises:
        UserError: naming a tensor without a rule.
    """
    mappings = [*table.map_names(tensors, config), *table.list_copies(config)]
    return {mapping.hf_name: mapping.join([tensors[name] for name in mapping.names], config) for mapping in mappings}
