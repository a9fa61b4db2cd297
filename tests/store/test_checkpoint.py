"""Checkpoints of one process: equal to the bit, whole or not at all, and the right ones are kept."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from litgpt.errors import UserError
from litgpt.files import verify_manifest
from litgpt.store import checkpoint_save
from litgpt.store.checkpoint_load import find_checkpoint, find_latest, load_checkpoint, open_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from tests.store.layout_worker import assert_same, build, train, whole_state


def two_layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(2, 4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def save(out_dir: Path, number: int, *, is_best: bool = False, **settings: Any) -> Path:
    model = two_layers(number)
    checkpoints = Checkpoints(out_dir, **settings)
    checkpoints.save(number, model, None, {"tokens": number}, is_best=is_best)
    folder = checkpoints.commit()
    assert folder is not None
    return folder


class Counting(torch.optim.SGD):
    """An optimizer that keeps Python numbers and an odd-shaped tensor beside its momentum."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                state["scale"] = state["calls"] / 3
                state["table"] = torch.arange(7, dtype=torch.uint8)


OPTIMIZERS = {
    "adamw": lambda matrices, rest: [torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}])],
    "amsgrad": lambda matrices, rest: [torch.optim.AdamW(matrices + rest, amsgrad=True, fused=True)],
    "sgd": lambda matrices, rest: [torch.optim.SGD(matrices + rest, lr=0.1, momentum=0.9)],
    "plain sgd": lambda matrices, rest: [torch.optim.SGD(matrices + rest, lr=0.1)],
    "muon": lambda matrices, rest: [torch.optim.Muon(matrices), torch.optim.AdamW(rest, betas=(0.8, 0.9))],
    "numbers": lambda matrices, rest: [Counting(matrices + rest, lr=0.1, momentum=0.9)],
}


def optimizers_of(kind: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    created: list[torch.optim.Optimizer] = OPTIMIZERS[kind](matrices, rest)
    return created


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_continued_run_equals_an_unbroken_one(tmp_path: Path, kind: str) -> None:
    model = two_layers()
    optimizers = optimizers_of(kind, model)
    for _ in range(3):
        step(model, *optimizers)
    optimizers[0].param_groups[0]["k"] = 3  # as schedule-free optimizers count their steps
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, model, optimizers, {"tokens": 7, "guard": {"window": [0.1, 1e-300]}})
    for _ in range(3):
        step(model, *optimizers)
    checkpoints.commit()

    other = two_layers(seed=1)
    fresh = optimizers_of(kind, other)
    progress = load_checkpoint(tmp_path / "step-00000003", other, fresh)
    assert (progress["step"], progress["tokens"], progress["guard"]["window"]) == (3, 7, [0.1, 1e-300])
    for _ in range(3):
        step(other, *fresh)  # draws its inputs from the restored generator
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
    for old, new in zip(optimizers, fresh, strict=True):
        for first, second in zip(old.param_groups, new.param_groups, strict=True):
            assert {**first, "params": None} == {**second, "params": None}
            for p, q in zip(first["params"], second["params"], strict=True):
                assert old.state[p].keys() == new.state[q].keys()
                for key, value in old.state[p].items():
                    assert type(value) is type(new.state[q][key])
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(new.state[q][key])) or value is None


def test_tied_frozen_and_buffers_are_kept_and_names_do_not_depend_on_wrappers(tmp_path: Path) -> None:
    model, optimizer = build("plain", 1)
    train(model, optimizer)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, torch.compile(model), optimizer, {})
    folder = checkpoints.commit()
    assert folder is not None
    files = open_checkpoint(folder)
    assert "model.embedding.weight" in files.tensors and "model.head.weight" not in files.tensors
    assert "model.seen" in files.tensors and "model.scratch" not in files.tensors
    other, fresh = build("plain", 2)
    load_checkpoint(folder, other, fresh)
    assert_same(whole_state(model, optimizer), whole_state(other, fresh), "tied")
    assert other.head.weight is other.embedding.weight


@pytest.mark.parametrize("background", [True, False])
def test_later_steps_do_not_change_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    go = threading.Event()
    original = checkpoint_save.write_tensors

    def late_write(*given: Any) -> str:
        go.wait(10 * background)
        return original(*given)

    monkeypatch.setattr(checkpoint_save, "write_tensors", late_write)
    checkpoints = Checkpoints(tmp_path, asynchronous=background)
    checkpoints.save(1, model, optimizer, {})
    assert checkpoints.is_pending and checkpoints.is_written == (not background)
    assert find_latest(tmp_path) is None
    step(model, optimizer)
    go.set()
    folder = checkpoints.commit()
    assert folder is not None and checkpoints.commit() is None
    load_checkpoint(folder, model)
    assert all(torch.equal(first, second) for first, second in zip(before, model.parameters(), strict=True))


def test_a_folder_says_what_it_holds_and_carries_the_callers_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path / "out")
    files: dict[str, str | Path] = {"recipe.yaml": "seed: 1\n", "tokenizer.json": tmp_path / "tokenizer.json"}
    checkpoints.save(12, two_layers(), None, {}, files)
    folder = checkpoints.commit()
    assert folder == tmp_path / "out" / "step-00000012"
    names = ["manifest.json", "progress.json", "recipe.yaml", "shard-00000-of-00001.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert list(json.loads((folder / "manifest.json").read_text())["files"]) == names[1:]
    verify_manifest(folder)


def test_the_newest_that_verify_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, number, keep=9)
    (tmp_path / "step-00000003" / "progress.json").write_text("{}")
    save(tmp_path, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]
    save(tmp_path, 5, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_the_best_is_kept_until_a_better_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_steps() -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))

    checkpoints = Checkpoints(tmp_path, keep=1, on_error="continue", warn=lambda _line: None)

    def save_step(number: int, *, is_best: bool = False) -> list[int]:
        checkpoints.save(number, two_layers(), None, {}, is_best=is_best)
        checkpoints.save(number, two_layers(), None, {}, is_best=is_best)  # while it is written: nothing more to do
        checkpoints.commit()
        return list_steps()

    assert [save_step(1, is_best=True), save_step(2), save_step(3)] == [[1], [1, 2], [1, 3]]
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_save, "write_tensors", lambda *_: 1 / 0)
        assert save_step(4, is_best=True) == [1, 3], "a checkpoint that is not written replaces none"
    assert save_step(5) == [1, 5]
    checkpoints.save(5, two_layers(), None, {}, is_best=True)  # saved before it was evaluated
    assert [save_step(6), save_step(7, is_best=True)] == [[5, 6], [7]]
    assert save(tmp_path, 8, keep=1, best_step=7) == tmp_path / "step-00000008" and list_steps() == [7, 8]


def test_after_a_rollback_newer_steps_are_set_aside(tmp_path: Path) -> None:
    messages: list[str] = []
    for number in (2, 4, 6):
        save(tmp_path, number, keep=9)
    save(tmp_path, 4, keep=9, warn=messages.append)
    save(tmp_path, 3, keep=9, resumed_step=2, warn=messages.append)
    save(tmp_path, 5, keep=9, resumed_step=3, warn=messages.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000003",
        "step-00000004.abandoned",
        "step-00000004.abandoned-2",
        "step-00000005",
        "step-00000006.abandoned",
    ]
    assert len(messages) == 3 and all("renamed" in line for line in messages)
    assert find_latest(tmp_path) == tmp_path / "step-00000005"


def test_a_step_that_is_saved_already_is_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.save(4, two_layers(), None, {})
        checkpoints.commit()
    second = Checkpoints(tmp_path, resumed_step=4)
    second.save(4, two_layers(), None, {})
    assert second.commit() is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_what_a_dead_run_left_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "shard").write_text("half")
    messages: list[str] = []
    Checkpoints(tmp_path, warn=messages.append)
    assert len(messages) == 1 and "step-00000002.partial" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    cases: dict[str, nn.Module] = {
        r"lacks 2 tensor\(s\): 3.bias, 3.weight": nn.Sequential(*two_layers(), nn.Linear(3, 3)),
        r"unknown 2 tensor\(s\): 2.bias, 2.weight": nn.Sequential(nn.Linear(4, 5)),
        r"0.weight was saved as F32 \[5, 4\], in this run it is F32 \[6, 4\]": nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)
        ),
        "in this run it is BF16.*same model and precision": two_layers().bfloat16(),
    }
    for message, model in cases.items():
        with pytest.raises(UserError, match=message):
            load_checkpoint(folder, model)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    folder = checkpoints.commit()
    assert folder is not None
    with pytest.raises(UserError, match=r"saved with \['SGD'\], this run has \['AdamW'\]"):
        load_checkpoint(folder, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match="groups the parameters in another way"):
        load_checkpoint(folder, model, torch.optim.SGD(list(model.parameters())[:2], lr=0.1))


def test_settings_of_groups_are_those_of_the_run_that_resumes(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.5, 0.6), weight_decay=0.3)
    step(model, optimizer)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    folder = checkpoints.commit()
    assert folder is not None
    resumed = torch.optim.AdamW(model.parameters(), lr=0.2, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.0)
    before = {**resumed.param_groups[0]}
    load_checkpoint(folder, model, resumed)
    assert resumed.param_groups[0] == before
    assert len(resumed.state) == 4


def test_a_checkpoint_without_optimizer_state_says_what_begins_anew(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    sizes, messages = [], []
    for number, saved in enumerate((True, False), start=1):
        checkpoints = Checkpoints(tmp_path, save_optimizer=saved, save_rng=saved)
        checkpoints.save(number, model, optimizer, {})
        folder = checkpoints.commit()
        assert folder is not None
        sizes.append(sum(tensor.nbytes for tensor in load_file(next(folder.glob("*.safetensors"))).values()))
        resumed = torch.optim.AdamW(model.parameters())
        load_checkpoint(folder, two_layers(1), None, restore_rng=False, warn=messages.append)
        assert load_checkpoint(folder, model, resumed, warn=messages.append)["step"] == number
        assert bool(resumed.state) == saved
    assert sizes[1] == sum(parameter.nbytes for parameter in model.parameters()) < sizes[0] / 3
    assert messages == [
        "step-00000002: has no optimizer state (checkpoint.save_optimizer: false) and no random generators "
        "(checkpoint.save_rng: false); this begins anew"
    ]


def test_random_numbers_go_on_only_where_the_layout_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder = save(tmp_path, 1)
    torch.manual_seed(1)
    model = two_layers(1)
    expected = torch.rand(3)
    load_checkpoint(folder, model)
    assert torch.equal(torch.rand(3), expected)
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**progress, "ranks": 2}))
    messages: list[str] = []
    state = torch.get_rng_state()
    load_checkpoint(folder, model, warn=messages.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(messages) == 1 and "saved by 2 ranks" in messages[0]


def test_resume_finds_what_it_is_asked_for(tmp_path: Path) -> None:
    assert find_checkpoint(False, tmp_path) is None and find_checkpoint("auto", tmp_path / "none") is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(True, tmp_path)
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert find_checkpoint(True, tmp_path) == find_checkpoint("auto", tmp_path) == second
    assert find_checkpoint(first, tmp_path) == find_checkpoint(str(first), "elsewhere") == first
    with pytest.raises(UserError, match=r"manifest\.json: no such file; name a step folder"):
        find_checkpoint(tmp_path, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(first / "lit_model.pth", tmp_path)
    (first / "progress.json").unlink()
    with pytest.raises(UserError, match=r"resume: .*progress\.json: no such file"):
        find_checkpoint(first, tmp_path)
