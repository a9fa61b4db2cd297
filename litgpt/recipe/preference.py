"""The settings of preference training: the losses of pairs and of rated answers, and the reference model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Positive, Rate, check_numbers
from litgpt.recipe.effect import check_effects

DPOLossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
LossType = Literal[DPOLossType, "orpo", "simpo", "cpo", "cpo_hinge", "cpo_ipo", "kto", "reward"]
Smoothing = Annotated[float, Ge(0.0), Le(0.49)]

KEY = "preference."
DPO = get_args(DPOLossType)
CPO = ("cpo", "cpo_hinge", "cpo_ipo", "simpo")
WITH_REFERENCE = {*DPO, "kto"} - {"sft"}
WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
"""The losses of the difference of two rewards. In others, the normalization of the optimal policy does not cancel."""
WITH_SMOOTHING = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "cpo", "simpo"}
SORTED = {"aot", "aot_unpaired"}
"""The losses that sort the scores of a micro-batch, and so depend on its size."""


@dataclass(frozen=True)
class PreferenceArgs:
    """The loss of preference training, and the reference model that it is relative to."""

    OTHER_NAMES: ClassVar = {
        "loss_type": {
            **{"dpo": "sigmoid", "cdpo": "sigmoid", "rso": "hinge", "slic": "hinge", "exo": "exo_pair"},
            **{"nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard", "aot_pair": "aot_unpaired", "rm": "reward"},
        }
    }
    """Values by their names in other projects."""

    loss_type: LossType | list[LossType] = "sigmoid"
    """One loss, or a list of DPO losses to add: sigmoid is DPO; sft is the loss of the chosen answers."""
    loss_weights: list[Rate] | None = None
    """The factor of each loss in loss_type; null for 1."""
    beta: Positive | None = None
    """Strength of the pull to the reference, tau of ipo, lambda of orpo; null for 0.1, and 2 with simpo."""
    label_smoothing: Smoothing = 0.0
    """Probability that a preference is wrong (sigmoid, exo_pair, robust, aot, aot_unpaired, cpo, simpo)."""
    rpo_alpha: Rate | None = None
    """Weight of the loss of the chosen answers, per token, that is added to DPO losses; null for none."""
    reference_free: bool = False
    """Use log-probabilities in place of their differences to the reference, which is then not computed."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that DPO regularizes with (sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, discopop)."""
    f_alpha_divergence_coef: Fraction = 0.5
    """Alpha of alpha_divergence as in TRL: 0 is forward_kl and 1 reverse_kl; ms-swift's is one minus this."""
    ld_alpha: Fraction | None = None
    """LD-DPO: weight of the tokens beyond the length of the shorter answer of a pair; null for 1."""
    use_weighting: bool = False
    """WPO: weight each pair by the probability of both answers under the policy."""
    discopop_tau: Positive = 0.05
    """Temperature of the blend of losses in discopop."""
    simpo_gamma: Rate = 1.0
    """Margin of rewards in simpo."""
    cpo_alpha: Rate | None = None
    """Weight of the loss of the chosen answers, per token, in cpo and simpo; null for 1, and 0 with simpo."""
    desirable_weight: Rate = 1.0
    """Weight of desirable answers in kto."""
    undesirable_weight: Rate = 1.0
    """Weight of undesirable answers in kto."""
    center_rewards_coefficient: Rate | None = None
    """Weight of the squared sum of the two rewards of a pair in reward; null for none."""
    reference: Path | None = None
    """Folder of the reference: a model, or an adapter of this one; null for the weights at the start of the run."""
    reference_offload: bool = False
    """Keep the weights of the reference in host memory."""
    precompute_ref_log_probs: bool = False
    """Compute the log-probabilities of the reference once, before training, and store them."""
    sync_ref_model: bool = False
    """TR-DPO: move the reference towards the policy while training."""
    ref_model_mixup_alpha: Fraction = 0.6
    """With sync_ref_model: share of the policy in the new reference."""
    ref_model_sync_steps: Count = 512
    """With sync_ref_model: number of optimizer steps between moves of the reference."""
    disable_dropout: bool = True
    """Train without dropout, as the reference is computed without it."""

    def __post_init__(self) -> None:
        check_numbers(self, KEY)
        self._check_types()
        self._check_values()
        self._check_effects()

    @property
    def types(self) -> tuple[str, ...]:
        """The losses to add."""
        return tuple(self.loss_type) if isinstance(self.loss_type, list) else (self.loss_type,)

    @property
    def weights(self) -> tuple[float, ...]:
        """The factor of each of `types`."""
        return tuple(self.loss_weights or [1.0] * len(self.types))

    @property
    def resolved_beta(self) -> float:
        """`beta`, or the default of the loss."""
        return self.beta or (2.0 if self.types == ("simpo",) else 0.1)

    @property
    def nll_weight(self) -> float:
        """The factor of the loss of the chosen answers, which is a mean over their tokens."""
        weight = self.rpo_alpha or 0.0
        for name, factor in zip(self.types, self.weights, strict=True):
            if name in ("sft", "orpo"):
                weight += factor
            elif name in CPO:
                weight += factor * (self.cpo_alpha if self.cpo_alpha is not None else float(name != "simpo"))
        return weight

    @property
    def needs_reference(self) -> bool:
        """Whether the loss is relative to a reference model."""
        return not self.reference_free and bool(WITH_REFERENCE & set(self.types))

    def describe(self) -> str:
        """Describe the losses, their strength and the reference in one line."""
        factors = [f"{weight:g} x " if weight != 1 else "" for weight in self.weights]
        parts = [" + ".join(factor + name for factor, name in zip(factors, self.types, strict=True))]
        if set(self.types) - {"sft", "reward"}:
            parts.append(f"beta {self.resolved_beta:g}")
        if self.nll_weight and self.types != ("sft",):
            parts.append(f"loss of chosen answers x {self.nll_weight:g}")
        if self.needs_reference:
            reference = self.reference or "the initial weights"
            moves = f", moved every {self.ref_model_sync_steps:,} steps" if self.sync_ref_model else ""
            precomputed = ", computed before training" if self.precompute_ref_log_probs else ""
            parts.append(f"reference: {reference}{moves}{precomputed}")
        elif set(self.types) & WITH_REFERENCE:
            parts.append("no reference (reference_free)")
        return "; ".join(parts)

    def _check_types(self) -> None:
        if not self.types:
            raise UserError("preference.loss_type: [] is empty; use sigmoid")
        for name in self.types:
            if len(self.types) > 1 and name not in DPO:
                raise UserError(
                    f"preference.loss_type: {name} cannot be combined with other losses; use {name} alone, or a list "
                    f"of {', '.join(DPO)}"
                )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.types):
            raise UserError(
                f"preference.loss_weights: {self.loss_weights} is not valid; use {len(self.types)}, one for each of "
                f"preference.loss_type: {', '.join(self.types)}"
            )

    def _check_values(self) -> None:
        """Check the settings whose valid values depend on others."""
        if "exo_pair" in self.types and not self.label_smoothing:
            raise UserError(
                "preference.label_smoothing: 0 is not valid with preference.loss_type: exo_pair, whose loss is then "
                "infinite; set 0.001"
            )
        if not any(self.weights):
            raise UserError(f"preference.loss_weights: {self.loss_weights} trains nothing; set one that is not 0")
        if self.types == ("kto",) and not (self.desirable_weight or self.undesirable_weight):
            raise UserError(
                "preference.desirable_weight: 0 and preference.undesirable_weight: 0 train nothing; set one to 1"
            )
        if self.rpo_alpha is not None and "sft" in self.types:
            raise UserError(
                f"preference.rpo_alpha: {self.rpo_alpha:g} and preference.loss_type: sft are the same loss; set "
                "preference.rpo_alpha: null, and its weight in preference.loss_weights"
            )
        if self.f_divergence_type != "reverse_kl":
            self._check_divergence()
        if self.use_weighting and SORTED & set(self.types):
            raise UserError(
                "preference.use_weighting: true is not supported with preference.loss_type: aot and aot_unpaired, "
                "which sort the pairs; set false, or use sigmoid"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise UserError(
                "preference.precompute_ref_log_probs: true and preference.sync_ref_model: true are mutually "
                "exclusive, because the reference moves; set one of them to false"
            )

    def _check_divergence(self) -> None:
        shown, valid = f"preference.f_divergence_type: {self.f_divergence_type}", ", ".join(sorted(WITH_DIVERGENCE))
        shown += " is not supported"
        for name in self.types:
            if name in WITH_REFERENCE - WITH_DIVERGENCE:
                raise UserError(f"{shown} with preference.loss_type: {name}; use reverse_kl, or {valid}")
        if self.reference_free:
            raise UserError(f"{shown} with preference.reference_free: true; use reverse_kl, or false")

    def _check_effects(self) -> None:
        """Check that every setting that is not at its default has an effect."""
        types = set(self.types)
        dpo = types & set(DPO) - {"sft"}
        pairs = types - {"sft", "kto", "reward"}
        shown = f"preference.loss_type: {', '.join(self.types)}"
        by_type: list[tuple[tuple[str, ...], bool, str]] = [
            (("beta",), bool(types - {"sft", "reward"}), "sigmoid"),
            (("label_smoothing",), bool(types & WITH_SMOOTHING), "sigmoid"),
            (("rpo_alpha", "reference_free", "ld_alpha"), bool(dpo), "sigmoid"),
            (("f_divergence_type",), bool(types & WITH_DIVERGENCE), "sigmoid"),
            (("use_weighting",), bool(pairs), "sigmoid"),
            (("discopop_tau",), "discopop" in types, "discopop"),
            (("simpo_gamma",), "simpo" in types, "simpo"),
            (("cpo_alpha",), bool(types & set(CPO)), "cpo"),
            (("desirable_weight", "undesirable_weight"), "kto" in types, "kto"),
            (("center_rewards_coefficient",), "reward" in types, "reward"),
        ]
        for names, have_effect, cure in by_type:
            cure = f"set {KEY}loss_type: {cure}, or leave it out"
            check_effects(self, KEY, *names, have_effect=have_effect, other=shown, cure=cure)
        other, cure = (
            f"preference.f_divergence_type: {self.f_divergence_type}",
            f"set {KEY}f_divergence_type: alpha_divergence",
        )
        has_alpha = self.f_divergence_type == "alpha_divergence"
        check_effects(self, KEY, "f_alpha_divergence_coef", have_effect=has_alpha, other=other, cure=cure)
        names = ("reference", "reference_offload", "precompute_ref_log_probs", "sync_ref_model")
        free = "preference.reference_free: true" if self.reference_free else shown
        cure = "leave it out"
        check_effects(self, KEY, *names, have_effect=self.needs_reference, other=free, cure=cure)
        names, cure = ("ref_model_mixup_alpha", "ref_model_sync_steps"), f"set {KEY}sync_ref_model: true"
        other = "preference.sync_ref_model: false"
        check_effects(self, KEY, *names, have_effect=self.sync_ref_model, other=other, cure=cure)
