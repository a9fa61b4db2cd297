"""An account of a folder's tensors: which rule reads each, what is left over, and whether they write back alike."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import NameTable, TensorMapping
from litgpt.store.load_model import PublishedTensor, find_name_table, get_parameter_shapes
from litgpt.store.weight_files import WeightSource, open_weights


@dataclass
class TensorAudit:
    """Every published tensor of a folder, and what became of it.

    Attributes:
        read: each published tensor that becomes ours.
        left_out: those without weights, or of parts that the model has not; by name, with the reason.
        unknown: those that no rule knows.
        missing: our tensors that nothing in the folder becomes.
        misshapen: one line for each tensor of another shape or type than the model's.
    """

    source: WeightSource
    table: NameTable | None
    read: list[TensorMapping] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        return not (self.unknown or self.missing or self.misshapen)

    def kinds(self) -> dict[str, int]:
        """How many tensors each kind of rule reads."""
        return dict(Counter(step.kind for step in self.read))


def audit_folder(folder: Path, config: Config) -> TensorAudit:
    """Account for every tensor in a folder; looks at no values.

    Raises:
        UserError: if there are no weights, or their files are damaged.
    """
    source = open_weights(folder)
    ledger = TensorAudit(source, find_name_table(source, folder, config))
    shapes = get_parameter_shapes(config)
    if ledger.table is None:
        ledger.read = [TensorMapping(name, (name,), "rename") for name in source.names if name in shapes]
        ledger.unknown = [name for name in source.names if name not in shapes]
    else:
        sort_names(ledger, ledger.table, config)
    found: dict[str, set[int | None]] = {}
    for step in ledger.read:
        for name in step.names:
            found.setdefault(name, set()).add(step.expert)
        if len(step.names) == 1 and step.names[0] == "head.weight" and config.tie_embeddings:
            continue
        if not set(step.names) <= shapes.keys():
            ledger.unknown.append(step.hf_name)
            continue
        try:
            PublishedTensor(source, step, config, shapes).check()
        except UserError as error:
            ledger.misshapen.append(str(error))
    everyone = set(range(config.n_expert))
    ledger.missing = [
        name for name in shapes if name not in found or not (None in found[name] or found[name] >= everyone)
    ]
    return ledger


def sort_names(ledger: TensorAudit, table: NameTable, config: Config) -> None:
    """Put every published name where it belongs."""
    names = ledger.source.names
    ledger.left_out |= dict.fromkeys(table.left_unread(names, config), "the model has no such part")
    for name in names:
        if name in ledger.left_out:
            continue
        if table.ignores(name, config):
            ledger.left_out[name] = "holds no weights"
        elif step := table.step(name, config):
            ledger.read.append(step)
        else:
            ledger.unknown.append(name)


def find_differing(ledger: TensorAudit, config: Config) -> list[str]:
    """The published tensors that do not come out to the bit when ours are written back by the same table.

    A folder whose head repeats the embedding it is tied to, or that uses an older layout of the same tensors, is
    compared by what it becomes of ours.
    """
    shapes = get_parameter_shapes(config)
    read = {step.hf_name: step for step in ledger.read if step.names != ("head.weight",) or "head.weight" in shapes}
    wrong = []
    written: set[str] = set()
    steps = ledger.table.map_names(shapes, config) if ledger.table else ledger.read
    by_ours = {(step.names, step.expert): step for step in read.values()}
    for step in steps:
        reading = by_ours.get((step.names, step.expert))
        if reading is None:
            wrong.append(step.hf_name)
            continue
        published = ledger.source.read(reading.hf_name)
        parts = reading.split(published, config)
        back = step if step.hf_name == reading.hf_name else reading  # an older layout, or another start of the name
        given = [part if step.expert is None else Expert(part) for part in parts]
        again = back.join(given, config)  # type: ignore[arg-type]
        if again.shape != published.shape or not torch.equal(again, published):
            wrong.append(reading.hf_name)
        written.add(reading.hf_name)
        ledger.source.release(reading.hf_name)
    return wrong + [name for name in read if name not in written]


class Expert:
    """One expert's slice standing in for the whole stack, to be asked for by its number."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self.values
