"""Read a config from the `config.json` of a published architecture, and write it.

Most keys are plain copies of one config field. The rest uses translations: pairs of functions, one from keys to config
fields, one back. The file of a family names those it needs, with settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from litgpt.model.hf_config_experts import EXPERT_TRANSLATIONS
from litgpt.model.hf_config_layers import LAYER_TRANSLATIONS
from litgpt.model.hf_config_rope import ROPE_TRANSLATIONS
from litgpt.model.hf_config_towers import TowerKeys
from litgpt.model.hf_config_values import Translation, Values, unsupported_key
from litgpt.model.transformer_config import TransformerConfig

TRANSLATIONS: dict[str, Translation] = {**ROPE_TRANSLATIONS, **LAYER_TRANSLATIONS, **EXPERT_TRANSLATIONS}
SINGLE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
"""The labels of a classifier with one output, as transformers writes them."""


def read_single_label(values: Values) -> dict[str, Any]:
    """The config fields of a reward model, which is a classifier with a single label.

    Raises:
        UserError: if it has several, as by default.
    """
    labels = values.get("id2label")
    count = values.get("num_labels", len(labels) if isinstance(labels, dict) else 2)
    if count != 1:
        raise unsupported_key("num_labels", count, "1, which is a reward model")
    return {"output": "score"}


@dataclass(frozen=True, kw_only=True)
class WholeKeys:
    """A published model that an architecture is one of several parts of; the others are written back as they came.

    Attributes:
        model_type: in its `config.json`.
        key: the key there that has the part's; None if they are among those of the others, without which it is never
            published.
        start: of the names of the part's tensors.
        files: patterns of further files that it needs.
    """

    model_type: str
    key: str | None = None
    start: str = ""
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ImageHeadKeys:
    """How the head of an architecture is published.

    Attributes:
        key: of the `config.json`, which has the settings of the codes, those of the head among them.
        names: what the names of the tensors of each part of an `ImageHead` begin with.
    """

    key: str
    names: Mapping[str, str]

    def publish(self, name: str) -> str:
        """The published name of a parameter."""
        part, _, rest = name.partition(".")
        return f"{self.names[part]}.{rest}"


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """The keys of an architecture's `config.json`.

    Attributes:
        fixed: config fields that all its models share.
        config: config field and the key with the same value.
        translated: the translations for the rest, with their settings; in the order of reading.
        expect: keys that must have one of some values; the first is written.
        missing: transformers' defaults of absent keys.
        nested: the key of the language model in a multimodal config; without `towers` it is only read.
        towers: the keys of its towers; none if they are not read.
        whole: the model that it may be published as a part of; None if it is published alone.
        image_head: the keys of its head of images; None if it has none.
        reward_architecture: the architecture of its reward models, which have one label; None without one.
    """

    architectures: list[str]
    model_type: str
    fixed: Values
    config: Mapping[str, str]
    translated: Mapping[str, Mapping[str, Any]]
    expect: Mapping[str, list[Any]] = field(default_factory=dict)
    missing: Values = field(default_factory=dict)
    nested: str | None = None
    towers: list[TowerKeys] = field(default_factory=list)
    whole: WholeKeys | None = None
    image_head: ImageHeadKeys | None = None
    reward_architecture: str | None = None

    @property
    def part_types(self) -> dict[str, str]:
        """The model types of decoder and towers, by the keys that have theirs; empty without towers."""
        decoders = {"text_config": self.towers[0].decoder_type} if self.towers else {}
        return {**decoders, **{tower.key: tower.tower_type for tower in self.towers}}

    @property
    def is_never_alone(self) -> bool:
        """Whether it is published only with the other parts of a model."""
        return self.whole is not None and self.whole.key is None

    def is_whole(self, values: Values) -> bool:
        """Whether a `config.json` is of a model that this architecture is a part of."""
        return self.whole is not None and values.get("model_type") == self.whole.model_type

    def select_part(self, values: Values) -> Values:
        """The keys of the part that this architecture is, or all of a model that is published alone.

        Raises:
            UserError: if they are no mapping.
        """
        if self.whole is None or self.whole.key is None or not self.is_whole(values):
            return values
        if not isinstance(part := values.get(self.whole.key), dict):
            raise unsupported_key(self.whole.key, part, "a mapping of this part's keys")
        return part

    def read(self, values: Values, *, name: str = "") -> TransformerConfig:
        """Read the `config.json` of a model of this architecture.

        Raises:
            UserError: naming a key whose value is not supported.
        """
        outer = self.select_part(values)
        outer = {**{key: value for tower in self.towers for key, value in tower.missing_outside.items()}, **outer}
        values = {**self.missing, **self._select_keys(outer)}
        for key, accepted in self.expect.items():
            if values.get(key) not in accepted:
                raise unsupported_key(key, values.get(key), repr(accepted[0]))
        fields = {name: values[key] for name, key in self.config.items() if values.get(key) is not None}
        for kind, settings in self.translated.items():
            fields |= TRANSLATIONS[kind].read(values, fields, **settings)
        if self.reward_architecture in (values.get("architectures") or []):
            fields |= read_single_label(values)
        fields |= {tower.part: tower.read(outer, fields.get("n_embd", 0)) for tower in self.towers}
        labels = {"name": name, "hf_config": {"model_type": self.model_type}}
        return TransformerConfig(**{**fields, "vocab_size": fields.get("padded_vocab_size"), **self.fixed, **labels})

    def _select_keys(self, values: Values) -> Values:
        """The keys of the language model, and those outside that apply to it."""
        if self.nested is None:
            return values
        inner = values.get(self.nested, values if self.towers else None)  # Qwen2-VL was published with one level
        if not isinstance(inner, dict):
            raise unsupported_key(self.nested, inner, "a mapping of the language model's keys")
        tied = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
        if any(tower.ties == "either" for tower in self.towers) and inner.get("tie_word_embeddings"):
            tied = {}
        return {**inner, **tied}

    def config_json(self, config: TransformerConfig) -> dict[str, Any]:
        """The `config.json` of a model, rope in the form before transformers 5 and in that since."""
        written: dict[str, Any] = {"architectures": list(self.architectures), "model_type": self.model_type}
        written["pad_token_id"] = None  # the default of an architecture may be outside the vocabulary
        if config.output == "score" and self.reward_architecture:
            written |= {"architectures": [self.reward_architecture], **SINGLE_LABEL}
        written |= {key: accepted[0] for key, accepted in self.expect.items()}
        written |= {key: getattr(config, name) for name, key in self.config.items()}
        for kind, settings in self.translated.items():
            written |= TRANSLATIONS[kind].write(config, **settings)
        if not self.towers:
            return written
        outside = {key: written.pop(key) for key in ("architectures", "model_type")}
        outside |= {"tie_word_embeddings": config.tie_embeddings}
        outside["text_config"] = {**written, "model_type": self.towers[0].decoder_type}
        return {**outside, **{key: value for tower in self.towers for key, value in tower.write(config).items()}}
