"""Map all tensor names of a folder to parameters in one pass, and list unknown, missing and mismatched ones.

Loading reads the tensors that the audit lists, if it is clean; `verify` and `validate` report the audit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.messages import print_message
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.model.names import NO_SUCH_PART, NameTable, TensorMapping
from litgpt.store.collectives_io import Warn
from litgpt.store.published_tensor import CORRECT_CONFIG, PublishedTensor, list_parameters, split_rows
from litgpt.store.weight_files import WeightSource, open_weights


@dataclass
class TensorAudit:
    """The published tensors of a folder, sorted by their use.

    Attributes:
        tensors: tensors that are loaded to parameters of the model.
        tied_heads: output heads that are published although the model ties them to its embedding.
        copies: tensors of prediction layers that repeat those of the model, which they share.
        left_out: tensors that hold no weights or belong to parts that the model lacks; by name, with the reason.
        unknown: names of tensors that the model does not have.
        missing: parameters that the folder does not have, with the index of the first expert that is missing.
        mismatched: a message for each tensor with another shape or type than the model's, or a second source.
    """

    source: WeightSource
    table: NameTable | None
    tensors: list[PublishedTensor] = field(default_factory=list)
    tied_heads: list[PublishedTensor] = field(default_factory=list)
    copies: list[PublishedTensor] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether every tensor is known and matches the model, and no parameter is missing."""
        return not (self.unknown or self.missing or self.mismatched)

    @property
    def mappings(self) -> list[TensorMapping]:
        """The mappings of the tensors that are read."""
        return [tensor.mapping for tensor in (*self.tensors, *self.tied_heads, *self.copies)]

    def check(self) -> None:
        """Check that the tensors of the folder are those of the model.

        Raises:
            UserError: naming the tensors that are not.
        """
        path = self.source.path
        if self.unknown:
            raise UserError(f"{path}: {shorten(self.unknown)}: no tensor of this name in the model; {CORRECT_CONFIG}")
        if self.missing:
            raise UserError(f"{path}: lacks {shorten(self.missing)}; {CORRECT_CONFIG}")
        if self.mismatched:
            raise UserError(self.mismatched[0])
        if head := self.find_untied_head():
            raise UserError(
                f"{path}: {head.hf_name} differs from the embedding, but the model ties them; "
                "set model_config.tie_embeddings: false"
            )
        for copy in self.list_differing_copies():
            raise UserError(
                f"{path}: {copy.hf_name} differs from the model's {copy.mapping.names[0]}, but prediction layers share "
                "it; set model_config.n_prediction_layers: 0 to leave them out"
            )

    def find_untied_head(self) -> PublishedTensor | None:
        """The published output head that differs from the embedding that the model ties it to; None without one."""
        embeddings = [tensor for tensor in self.tensors if "embedding.weight" in tensor.mapping.names]
        return next((head for head in self.tied_heads for other in embeddings if not is_equal(head, other)), None)

    def list_differing_copies(self) -> Iterator[PublishedTensor]:
        """The tensors of prediction layers that differ from those of the model that they repeat."""
        published = {tensor.mapping.names[0]: tensor for tensor in self.tensors}
        return (copy for copy in self.copies if not is_equal(copy, published[copy.mapping.names[0]]))


def audit_folder(folder: Path, config: Config) -> TensorAudit:
    """Audit every tensor in a model folder or a `.gguf` file; reads no values.

    Raises:
        UserError: if there are no weights, their files are damaged, or no architecture with their names is known.
    """
    source = open_weights(folder)
    return audit_source(source, find_name_table(source, folder, config), config)


def audit_source(source: WeightSource, table: NameTable | None, config: Config) -> TensorAudit:
    """Audit every tensor of a source; `table` maps its names to ours, None if they are ours."""
    parameters = list_parameters(config)
    audit = TensorAudit(source, table)
    published_as: dict[str, dict[int | None, str]] = {name: {} for name in parameters}
    copies = {mapping.hf_name: mapping for mapping in table.list_copies(config)} if table else {}
    for hf_name in source.names:
        if reason := table.get_skip_reason(hf_name, config) if table else "":
            audit.left_out[hf_name] = reason
            continue
        if hf_name in copies:
            audit.copies.append(PublishedTensor(source, copies[hf_name], config, parameters))
            continue
        mapping = table.map_hf_name(hf_name, config) if table else TensorMapping(hf_name, (hf_name,), "rename")
        tensor = PublishedTensor(source, mapping, config, parameters) if mapping else None
        if mapping is None or tensor is None:
            audit.unknown.append(hf_name)
        elif mapping.names == ("head.weight",) and config.tie_embeddings:
            audit.tied_heads.append(tensor)
        elif not set(mapping.names) <= parameters.keys() or (mapping.expert or 0) >= max(1, config.n_expert):
            audit.unknown.append(hf_name)
        else:
            audit.tensors.append(tensor)
            try:
                check_published_once(tensor, published_as)
                tensor.check()
            except UserError as error:
                audit.mismatched.append(str(error))
    audit.missing = list_missing(published_as, config)
    return audit


def find_name_table(source: WeightSource, folder: Path, config: Config) -> NameTable | None:
    """Find the table that maps the names of a source to ours; None if they are ours."""
    if source.table or "embedding.weight" in source.names:
        return source.table
    if any(name.startswith("transformer.wte.") for name in source.names) and source.path.suffix == ".pth":
        return registry.load_litgpt_table()
    folder = folder.parent if folder.is_file() else folder
    published = registry.find_published_family(read_json_object(folder / "config.json"))
    family = published or registry.find_family(config)
    if family is None:
        raise UserError(
            f"{folder}: no known architecture has this shape and these tensor names; is config.json missing?"
        )
    return family.tensors


def check_published_once(tensor: PublishedTensor, published_as: dict[str, dict[int | None, str]]) -> None:
    """Record which tensor holds a parameter or an expert's slice of it; raises a UserError if another one does too."""
    expert = tensor.mapping.expert
    for name in tensor.mapping.names:
        for other_expert, other in published_as[name].items():
            if other_expert == expert or None in (other_expert, expert):
                raise UserError(f"{tensor.source.path}: {tensor.hf_name} and {other} both hold {name}; remove one")
        published_as[name][expert] = tensor.hf_name


def list_missing(published_as: dict[str, dict[int | None, str]], config: Config) -> list[str]:
    """The parameters that are not published; with the index of the first missing expert if others are published."""
    missing = []
    for name, experts in published_as.items():
        absent = [expert for expert in range(config.n_expert) if expert not in experts]
        if not experts:
            missing.append(name)
        elif None not in experts and absent:
            missing.append(f"{name}[{absent[0]}]")
    return missing


def list_published(folder: Path, config: Config, *, warn: Warn = print_message) -> list[PublishedTensor]:
    """List the tensors of a model in a folder, checked by name, type and shape; reads no values.

    Args:
        folder: a model folder, or a `.gguf` file.
        warn: called with one line if tensors are left out because the model has no such part.

    Raises:
        UserError: naming a tensor that only the folder or only the model has, or whose shape or type differs.
    """
    audit = audit_folder(folder, config)
    audit.check()
    unread = [name for name, reason in audit.left_out.items() if reason == NO_SUCH_PART]
    if unread:
        warn(f"{audit.source.path}: {len(unread)} tensors of parts that the model does not have, such as {unread[0]}")
    return audit.tensors


def is_equal(tensor: PublishedTensor, other: PublishedTensor) -> bool:
    """Whether two published tensors have the same values; compares them block by block."""
    pair = [tensor.source.read(tensor.hf_name), other.source.read(other.hf_name)]
    blocks: Iterable[tuple[Tensor, ...]] = zip(*(split_rows(values, pair[0]) for values in pair), strict=False)
    equal = pair[0].shape == pair[1].shape and all(torch.equal(*block) for block in blocks)
    tensor.release()
    other.release()
    return equal


def find_differing(audit: TensorAudit, config: Config) -> list[str]:
    """The published tensors that differ in any bit when they are converted to ours and back with the same table.

    An output head that is tied to the embedding is not compared. Tensors in an older layout or with another prefix are
    converted back by the rule that reads them, and matrices that may be (in, out) or (out, in) to what they were.
    """
    mappings = audit.table.map_names(list_parameters(config), config) if audit.table else audit.mappings
    unwritten = {(tensor.mapping.names, tensor.mapping.expert): tensor for tensor in audit.tensors}
    differing = []
    for mapping in mappings:
        tensor = unwritten.pop((mapping.names, mapping.expert), None)
        if tensor is None:
            differing.append(mapping.hf_name)
            continue
        values = audit.source.read(tensor.hf_name)
        parts = tensor.mapping.split(values, config)
        inverse = mapping if mapping.hf_name == tensor.hf_name else tensor.mapping
        joined = inverse.join_parts(parts, config)
        if inverse.transposed == "either" and joined.shape != values.shape:
            joined = joined.mT
        if not torch.equal(joined, values):
            differing.append(tensor.hf_name)
        tensor.release()
    return differing + [tensor.hf_name for tensor in (*unwritten.values(), *audit.list_differing_copies())]


def shorten(names: list[str]) -> str:
    """The first five names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
