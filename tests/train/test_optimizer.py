"""Which parameters an optimizer trains, and which of them decay."""

import copy

import pytest
import torch
from torch import nn

from litgpt import adapt
from litgpt.adapt.parts import find_part
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_published_family
from litgpt.recipe.choices import OPTIMIZER_PATHS, find_unsupported_step
from litgpt.recipe.optimizer import SGD, AdamW, AdamW8bit, Custom, GaLore, Muon, Optimizer
from litgpt.recipe.part_rates import PartRates
from litgpt.recipe.tuner import LoRA
from litgpt.train.optimizer import allocate_states, build_optimizers, set_learning_rate
from tests.layouts.pool import POOL
from tests.store.models import small
from tests.train.layouts import build_model
from tests.vision_model import KINDS

TORCH_CLASSES = [
    path
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and (path := f"torch.optim.{name}") not in {*OPTIMIZER_PATHS, "torch.optim.Optimizer"}
    if find_unsupported_step(path, cls) is None
]


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
    for part in ("gate", "up", "down"):
        layers |= {f"mlp.shared.{part}.weight", f"mlp.experts.{part}"}
    assert taken == {f"blocks.0.{name}" for name in layers}
    rest = {names[one] for group in adamw.param_groups for one in group["params"]}
    assert taken | rest == set(names.values()) - {"blocks.0.mlp.router.correction"}


@pytest.mark.parametrize("settings", [Muon(lr=1e-3), GaLore(lr=1e-3, rank=2)])
@pytest.mark.parametrize("part", ["attention.q.weight", "attention.q", "embedding"])
def test_only_some_parameters_are_trained(settings: Muon | GaLore, part: str) -> None:
    decoder = model()
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad = part in name
    if isinstance(settings, GaLore) and part == "embedding":
        with pytest.raises(UserError, match="rank: 2 is not below the sides of any trained matrix; use AdamW"):
            build_optimizers(settings, decoder)
        return
    groups = [group for optimizer in build_optimizers(settings, decoder) for group in optimizer.param_groups]
    trained = {one for group in groups for one in group["params"]}
    assert trained == {one for one in decoder.parameters() if one.requires_grad}


def build_vision_model() -> GPT:
    values = {"model_type": "qwen2_vl", "image_token_id": 258, **KINDS["qwen2_vl"]["config"]}
    family = find_published_family(values)
    assert family is not None
    torch.manual_seed(0)
    return GPT(Config(**family.read(values).to_dict()))


def test_parts_with_rates_of_their_own_are_updated_as_by_hand() -> None:
    seeing, rates = build_vision_model(), {"llm": 1e-2, "vision": 0.0, "aligner": 3e-1}
    before = {name: parameter.detach().clone() for name, parameter in seeing.named_parameters()}
    optimizers = build_optimizers(SGD(lr=1e-2), seeing, rates=PartRates(vision=0.0, aligner=3e-1))
    set_learning_rate(optimizers, 0.5)
    for parameter in seeing.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert {find_part(name) for name in before} == rates.keys()
    for name, parameter in seeing.named_parameters():
        assert parameter.grad is not None
        expected = before[name].sub(parameter.grad, alpha=0.5 * rates[find_part(name)])
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("settings", [AdamW(lr=1e-3), Muon(lr=1e-3), GaLore(lr=1e-3, rank=1)])
def test_a_rate_of_a_part_is_that_of_all_its_groups(settings: Optimizer) -> None:
    seeing = build_vision_model()
    tuner = LoRA(r=2, lora_plus=4.0, modules_to_save=["vision.projector.norm"])
    adapt.attach(seeing, tuner)
    names = {parameter: name for name, parameter in seeing.named_parameters() if parameter.requires_grad}
    optimizers = build_optimizers(settings, seeing, tuner, PartRates(vision=2e-5, aligner=0.0))
    peaks = {
        names[one]: group["peak_lr"] for built in optimizers for group in built.param_groups for one in group["params"]
    }
    assert peaks.keys() == set(names.values())
    for name, peak in peaks.items():
        if (part := find_part(name)) != "llm":
            rate = {"vision": 2e-5, "aligner": 0.0}[part]
            assert peak == pytest.approx(rate * (4 if name.endswith("lora_b") else 1)), name
        else:
            assert peak >= 1e-3
    assert {find_part(name) for name in peaks} == {"llm", "vision", "aligner"}


def build_8bit_on_shards() -> str:
    with pytest.raises(UserError) as error:
        build_optimizers(AdamW8bit(), build_model(small("Llama-3.2-1B", n_layer=1), "shards", "32-true", seed=1))
    return str(error.value)


def test_shards_are_not_for_bitsandbytes() -> None:
    for message in POOL.run(build_8bit_on_shards, ranks=2):
        assert "AdamW8bit is not supported with sharded parameters; use PrecisionAwareAdamW" in message


class PlainDescent(torch.optim.Optimizer):
    """A class of a user, which takes only what it needs."""

    def __init__(self, params, lr: float, bound: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "bound": bound})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.clamp(-group["bound"], group["bound"])


@pytest.mark.parametrize("path", [*TORCH_CLASSES, f"{__name__}.PlainDescent"])
def test_every_other_class_trains_at_the_given_rate(path: str) -> None:
    start = nn.Linear(4, 4)
    steps = []
    for lr in (1e-12, 1e-1):
        layer = copy.deepcopy(start)
        (optimizer,) = build_optimizers(Custom(lr=lr, path=path), layer)
        assert {(group["lr"], group["peak_lr"]) for group in optimizer.param_groups} == {(lr, lr)}
        layer(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        steps.append((layer.weight - start.weight).abs().max().item())
    assert steps[0] < 1e-5 and steps[1] > 1e-4


def test_arguments_of_other_classes_reach_them() -> None:
    settings = Custom(lr=1e-3, path="torch.optim.NAdam", arguments={"weight_decay": 0.3, "betas": [0.8, 0.9]})
    (optimizer,) = build_optimizers(settings, nn.Linear(4, 4))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == [0.8, 0.9] for group in optimizer.param_groups)


def test_vectors_do_not_decay_by_the_default_of_a_class() -> None:
    (optimizer,) = build_optimizers(Custom(path="torch.optim.adamw.AdamW"), nn.Linear(4, 4))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "Adam",
            {"betas": [2.0, 0.9]},
            r"optimizer.betas: \[2.0, 0.9\] is not accepted by torch.optim.Adam \(Invalid beta",
        ),
        ("Adam", {"capturable": True, "eps": 1e-6}, r"optimizer.capturable: True .* supported devices.*; leave it out"),
        ("RMSprop", {"centered": True, "differentiable": True}, "optimizer.differentiable: True .*; leave it out"),
        ("Adagrad", {"foreach": True, "fused": True}, r"optimizer.foreach: True .*cannot be.*together.*; leave it out"),
        ("NAdam", {"capturable": True, "differentiable": True}, "optimizer.init_args: .*; use AdamW"),
    ],
)
def test_arguments_that_a_class_does_not_accept_at_its_first_step_are_one_line(name, arguments, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_optimizers(Custom(path=f"torch.optim.{name}", arguments=arguments), nn.Linear(4, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_states_that_are_allocated_are_those_of_the_first_step(amsgrad: bool) -> None:
    layers = [nn.Linear(3, 4), nn.Linear(3, 4)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.AdamW(layer.parameters(), fused=True, amsgrad=amsgrad) for layer in layers]
    allocate_states(optimizers[1])
    assert bool(optimizers[1].state) is not amsgrad
    for step in range(2):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer(torch.full((2, 3), step + 1.0)).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(optimizers[1].state_dict(), optimizers[0].state_dict(), rtol=0, atol=0)
    assert all(map(torch.equal, layers[1].parameters(), layers[0].parameters()))
