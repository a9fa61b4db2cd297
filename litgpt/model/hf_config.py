"""Read the shape of a model from the `config.json` of a published architecture, and write it.

Most keys are plain copies of one of our fields. What is said otherwise goes through a translation: a pair of functions,
one from their keys to our fields, one back. A family's file names those it needs, with settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from litgpt.model.hf_config_experts import EXPERT_TRANSLATIONS
from litgpt.model.hf_config_layers import LAYER_TRANSLATIONS
from litgpt.model.hf_config_rope import ROPE_TRANSLATIONS
from litgpt.model.hf_config_values import Translation, Values, unsupported
from litgpt.model.transformer_config import TransformerConfig

TRANSLATIONS: dict[str, Translation] = {**ROPE_TRANSLATIONS, **LAYER_TRANSLATIONS, **EXPERT_TRANSLATIONS}


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """How an architecture's `config.json` tells a shape.

    Attributes:
        fixed: our fields that all its members share.
        config: our field and the key that holds the same.
        translated: the translations that say the rest, with their settings; in the order of reading.
        expect: keys that must have one of some values; the first is written.
        missing: what transformers assumes for an absent key.
        nested: the key under which a folder of several models keeps the language model; such a folder is only read.
    """

    architectures: list[str]
    model_type: str
    fixed: Values
    config: Mapping[str, str]
    translated: Mapping[str, Mapping[str, Any]]
    expect: Mapping[str, list[Any]] = field(default_factory=dict)
    missing: Values = field(default_factory=dict)
    nested: str | None = None

    def read(self, values: Values, *, name: str = "") -> TransformerConfig:
        """The shape that a `config.json` of this architecture tells.

        Raises:
            UserError: naming a key whose value this model does not run.
        """
        values = {**self.missing, **self._stated(values)}
        for key, accepted in self.expect.items():
            if values.get(key) not in accepted:
                raise unsupported(key, values.get(key), repr(accepted[0]))
        ours = {ours: values[key] for ours, key in self.config.items() if values.get(key) is not None}
        for kind, settings in self.translated.items():
            ours |= TRANSLATIONS[kind].read(values, ours, **settings)
        labels = {"name": name, "hf_config": {"model_type": self.model_type}}
        return TransformerConfig(**{**ours, "vocab_size": ours.get("padded_vocab_size"), **self.fixed, **labels})

    def _stated(self, values: Values) -> Values:
        """The keys of the language model, and those around it that hold for it too."""
        if self.nested is None:
            return values
        inner = values.get(self.nested)
        if not isinstance(inner, dict):
            raise unsupported(self.nested, inner, "a mapping of the language model's keys")
        tied = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
        return {**inner, **tied}

    def config_json(self, config: TransformerConfig) -> dict[str, Any]:
        """The `config.json` of a model of this shape, rope in the form before transformers 5 and in that since."""
        written: dict[str, Any] = {"architectures": list(self.architectures), "model_type": self.model_type}
        written["pad_token_id"] = None  # the default of an architecture may lie outside the vocabulary
        written |= {key: accepted[0] for key, accepted in self.expect.items()}
        written |= {key: getattr(config, ours) for ours, key in self.config.items()}
        for kind, settings in self.translated.items():
            written |= TRANSLATIONS[kind].write(config, **settings)
        return written
