"""The options of a launch with their defaults, and the command of litgpt that does the same."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from litgpt.recipe.keys import parse_whole_number
from litgpt.recipe.launch_script import Launch
from litgpt.recipe.option_table import index_options, load_defaults, write_value

TRAINING = ("pretrain", "finetune", "finetune_full", "align", "kto", "rm")
ALIGNMENTS = {"dpo": "align", "orpo": "align", "simpo": "align", "cpo": "align", "kto": "kto", "rm": "rm"}
"""Commands for the kinds of alignment."""
NOT_TRANSLATED = {
    "rlhf": f"the kinds that are translated are {', '.join(ALIGNMENTS)}",
    "deploy": "vllm serve FOLDER serves the folder final of a run",
    "rollout": "not supported",
    "eval": "lm_eval --model hf --model_args pretrained=FOLDER reads the folder final of a run",
    "app": "litgpt generate answers a prompt",
    "web-ui": "a recipe is a YAML file",
    "sample": "not supported",
}
"""Why commands of the programs have none here."""
SWITCHED_OPTIMIZERS = (
    ("use_galore", "GaLore"),
    ("use_precision_aware_optimizer", "PrecisionAwareAdamW"),
    ("optimizer_cpu_offload", "PrecisionAwareAdamW"),
)
"""Options that select an optimizer beside `optimizer`."""
VALUE_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_word(word: str) -> Any:
    """Parse a value of a command line: a boolean, null, a number or a text."""
    if word.lower() in VALUE_WORDS:
        return VALUE_WORDS[word.lower()]
    if isinstance(number := parse_whole_number(word), int):
        return number
    try:
        return float(word)
    except ValueError:
        return word


def parse_words(words: list[str], *, is_text: bool = False) -> Any:
    """Parse the values of an option: true without one, a single value, or a list; texts stay as they are."""
    values = words if is_text else [parse_word(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def unknown_layers(_model: str) -> int | None:
    """Return None: the number of layers of a model is not known."""
    return None


@dataclass(frozen=True)
class LaunchOptions:
    """The options of a launch by the names of the table.

    Args:
        launch: the launch.
        converted: folders in Megatron's format that the script made before, and the models that they were made from.
        find_layers: returns the number of layers of a model by its name; None if it is not known.
    """

    launch: Launch
    converted: Mapping[str, str] = field(default_factory=dict)
    find_layers: Callable[[str], int | None] = unknown_layers

    @cached_property
    def given(self) -> dict[str, Any]:
        """The values in the script, by the names of the table; those that it does not have are left out."""
        words = self.launch.options | {name: [value] for name, value in self.launch.environment.items()}
        known = index_options()
        return {
            known[name].name: parse_words(values, is_text=known[name].is_text)
            for name, values in words.items()
            if name in known
        }

    @cached_property
    def command(self) -> str:
        """The command of litgpt; empty if there is none."""
        verb, full = self.launch.verb, write_value(self._find("train_type")) == "full"
        if verb in ("pt", "sft"):
            return "pretrain" if verb == "pt" and full else "finetune_full" if full else "finetune"
        if verb == "export" and self.is_true("merge_lora"):
            return "merge_lora"
        if verb == "export" and self.is_true("push_to_hub"):
            return "convert_from_litgpt"
        if verb == "rlhf":
            return ALIGNMENTS.get(str(self.given.get("rlhf_type", "dpo")), "")
        return {"infer": "generate", "merge-lora": "merge_lora"}.get(verb, "")

    def explain_no_command(self) -> str:
        """Return why there is no command to run."""
        for name in ("to_mcore", "to_hf", "to_cached_dataset"):
            if self.is_true(name):
                return index_options()[name].describe()
        return NOT_TRANSLATED.get(self.launch.verb, "not a command that is translated")

    @property
    def is_training(self) -> bool:
        """Whether the command trains."""
        return self.command in TRAINING

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the program for its command, which only trainings have."""
        if not self.is_training:
            return {}
        groups = load_defaults()[self.launch.program]
        kind = "full" if write_value(self._find("train_type")) == "full" else "lora"
        merged = {**groups["always"], **groups[kind], **groups.get(self.launch.verb, {})}
        for name, value in merged.items():
            if isinstance(value, str) and value.startswith("="):
                merged[name] = self.given.get(value[1:], merged[value[1:]])
        return merged

    def _find(self, name: str) -> Any:
        """Return the value of an option that the command depends on."""
        return self.given.get(name, load_defaults()[self.launch.program]["always"].get(name))

    @cached_property
    def classes(self) -> dict[str, str]:
        """The classes of the tuner and the optimizer; an adapter that is trained further has its own tuner."""
        tuner = index_options()["train_type"].values.get(write_value(self.get("train_type")), "")
        if tuner == "Full" and self.given.get("lisa_activated_layers"):
            tuner = "LISA"
        if self.is_given("adapter_load"):
            tuner = ""
        optimizer = index_options()["optimizer"].values.get(write_value(self.get("optimizer")), "")
        return {
            "tuner_class": tuner,
            "optimizer_class": next((name for option, name in SWITCHED_OPTIMIZERS if self.is_true(option)), optimizer),
            "command": self.command,
        }

    def is_given(self, name: str) -> bool:
        """Whether the script has an option."""
        return name in self.given

    def is_true(self, name: str) -> bool:
        """Whether an option is given and true."""
        return self.given.get(name) is True

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of an option, its default in the program, or else `default`."""
        if name in ("tuner_class", "optimizer_class", "command"):
            return self.classes[name]
        silent = load_defaults()[self.launch.program]["silent"]
        return self.given.get(name, self.defaults.get(name, silent.get(name, default)))

    def count_processes(self) -> int:
        """Return the number of processes, as far as the script tells."""
        devices, nodes = self.given.get("NPROC_PER_NODE"), self.given.get("NNODES", 1)
        return (devices if isinstance(devices, int) else 1) * (nodes if isinstance(nodes, int) else 1)

    def count_layers(self) -> int | None:
        """Return the number of layers of the model; None if it is not known."""
        if isinstance(layers := self.given.get("num_layers"), int):
            return layers
        name = self.given.get("model", self.given.get("load"))
        return self.find_layers(self.converted.get(str(name), str(name))) if name else None

    def list_unmet(self, when: Mapping[str, str]) -> Iterator[str]:
        """Yield each of the conditions of an option that is not fulfilled, as a text."""
        for name, wanted in when.items():
            if wanted in ("set", "unset"):
                fulfilled = self.is_given(name) == (wanted == "set")
                text = f"{'with' if wanted == 'set' else 'without'} {name}"
            else:
                values, excluded = wanted.removeprefix("not "), wanted.startswith("not ")
                listed = [part.strip() for part in values.lower().split(",")]
                fulfilled = (write_value(self.get(name)) in listed) != excluded
                text = f"with {name.removesuffix('_class')}" + (f" other than {values}" if excluded else f": {values}")
            if not fulfilled:
                yield text
