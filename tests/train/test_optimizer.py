"""Which parameters an optimizer trains, and which of them decay."""

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.optimizer import AdamW, Muon
from litgpt.train.optimizer import build_optimizers


def model() -> GPT:
    return GPT(
        Config(
            n_layer=1, n_embd=32, n_head=4, padded_vocab_size=64, block_size=64, intermediate_size=48, bias=True,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2,
            shared_expert_size=16, router_correction=True, attention_sinks=True, norm_qk=True, norm_qk_type="per_head",
        )
    )  # fmt: skip


def test_matrices_decay_and_biases_norms_and_stacks_of_them_do_not() -> None:
    decoder = model()
    (adamw,) = build_optimizers(AdamW(lr=1e-3, weight_decay=0.1), decoder)
    decays = {one: group["weight_decay"] > 0 for group in adamw.param_groups for one in group["params"]}
    for name, parameter in decoder.named_parameters():
        if name.endswith("correction"):
            assert parameter not in decays
        else:
            vector = "norm" in name or name.endswith(("bias", "sinks"))
            assert decays[parameter] is not vector, name


def test_muon_takes_the_matrices_of_blocks() -> None:
    decoder = model()
    muon, adamw = build_optimizers(Muon(lr=1e-3), decoder)
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    taken = {names[one] for group in muon.param_groups for one in group["params"]}
    layers = {f"attention.{part}.weight" for part in ("q", "k", "v", "out")} | {"mlp.router.weight"}
    assert taken == {f"blocks.0.{name}" for name in layers | {f"mlp.shared.{x}.weight" for x in ("gate", "up", "down")}}
    rest = {names[one] for group in adamw.param_groups for one in group["params"]}
    assert taken | rest == set(names.values()) - {"blocks.0.mlp.router.correction"}
