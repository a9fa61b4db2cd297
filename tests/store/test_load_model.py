"""Loading model folders: slice by slice, expert by expert, and without keeping the files in memory."""

import sys
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store import load_model, published_tensor
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.safetensors_files import MappedFile, SafetensorsFiles, TensorShard
from litgpt.store.save_model import save_model_folder
from litgpt.store.tensor_audit import list_published
from litgpt.store.weight_files import open_weights
from tests.processes import join_ranks, start_ranks
from tests.store.load_model_worker import check_slices
from tests.store.models import assert_loads, random_model, small, weights

EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "intermediate_size": 16}
MOE = {"mixtral": ("Mixtral-8x7B-v0.1", {}), "qwen3_moe": ("Qwen3-30B-A3B", {"moe_intermediate_size": 16})}


def resident(path: Path) -> int:
    """The bytes of a mapped file that are in this process's memory; /proc/self/smaps has them too, but slowly."""
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f" {path}")]
    pages = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for addresses in maps:
            first, end = (int(address, 16) // PAGESIZE for address in addresses.split("-"))
            pagemap.seek(8 * first)
            pages += sum(last >> 7 for last in pagemap.read(8 * (end - first))[7::8])  # bit 63: present
    return pages * PAGESIZE


def write_random_model(folder: Path, name: str, **changes: Any) -> GPT:
    model = random_model(small(name, **changes))
    save_model_folder(folder, config=model.config, tensors=weights(model))
    return model


@pytest.mark.parametrize("name", ["pythia-14m", "Llama-2-7b-hf"])
def test_a_rank_looks_at_its_own_slices_alone(tmp_path: Path, name: str) -> None:
    write_random_model(tmp_path / "model", name)
    codes = join_ranks(start_ranks(check_slices, tmp_path, folder=tmp_path, ranks=2))
    assert codes == [0, 0], [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages of a file are counted on Linux only")
@pytest.mark.parametrize("name", ["pythia-14m", "Llama-2-7b-hf"])
def test_what_was_copied_is_out_of_memory_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_random_model(
        tmp_path / "model", name, n_embd=512, head_size=128, intermediate_size=2048, padded_vocab_size=2048
    )
    path, seen = tmp_path / "model" / "model.safetensors", []
    release, block = MappedFile.release, 1 << 18
    monkeypatch.setattr(published_tensor, "BLOCK_BYTES", block)

    def watched(self: MappedFile, tensor: str) -> None:
        seen.append(resident(path))
        release(self, tensor)

    monkeypatch.setattr(MappedFile, "release", watched)
    load_model.load_model(model, tmp_path / "model")
    largest = max(tensor.nbytes for tensor in weights(model).values())
    # the kernel may bring in more than is looked at, up to what the page cache holds in one piece
    assert block / 2 < max(seen) < 2 * largest < path.stat().st_size / 2
    assert len(seen) > 2 * len(weights(model)), "tensors are copied block by block"


@pytest.mark.parametrize("family", MOE)
def test_stacked_experts_are_published_apart_and_come_back(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    name, more = MOE[family]
    model = write_random_model(tmp_path / "model", name, **{**EXPERTS, **more})
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(".experts." in key for key in state) == 3 * 4 * 2
    assert_loads(tmp_path / "model", model)
    for name, tensor in load_model.iter_tensors(tmp_path / "model", model.config):
        assert torch.equal(tensor, weights(model)[name]), name
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (hf_model(ids).logits - model(ids)).abs().max() < 1e-4


def test_no_stack_of_experts_is_held_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_random_model(tmp_path / "model", "Mixtral-8x7B-v0.1", **EXPERTS)
    published_names, whole = [], SafetensorsFiles.read

    def read(self: SafetensorsFiles, name: str) -> Tensor:
        published_names.append(name)
        return whole(self, name)

    def forbidden(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a stack was made")

    monkeypatch.setattr(SafetensorsFiles, "read", read)
    monkeypatch.setattr(torch, "stack", forbidden)
    monkeypatch.setattr(Tensor, "new_empty", forbidden)
    monkeypatch.setattr(torch, "cat", forbidden)
    load_model.load_model(model, tmp_path / "model")
    assert len(published_names) == len(set(published_names)) == len(load_file(tmp_path / "model/model.safetensors"))


def test_a_rank_with_some_experts_reads_only_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_random_model(tmp_path / "model", "Mixtral-8x7B-v0.1", **EXPERTS)
    read: list[str] = []
    source = open_weights(tmp_path / "model")
    whole = SafetensorsFiles.read
    monkeypatch.setattr(SafetensorsFiles, "read", lambda self, name: [read.append(name), whole(self, name)][1])
    name = "blocks.1.mlp.experts.down"
    local = torch.zeros(2, 32, 16)
    part = TensorShard(local, (4, 32, 16), (1, 0, 0), is_sharded=True, is_first_replica=True)  # experts 1 and 2
    for tensor in list_published(tmp_path / "model", model.config):
        if name in tensor.mapping.names:
            tensor.copy_to({name: part})
    assert torch.equal(local, weights(model)[name][1:3])
    assert len(read) == 2 and len(source.names) > 20


@pytest.mark.parametrize("change", ["missing", "extra", "twice"])
def test_the_experts_are_counted(tmp_path: Path, change: str) -> None:
    model = write_random_model(tmp_path / "model", "Mixtral-8x7B-v0.1", **EXPERTS)
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    expert = next(name for name in state if ".experts.3." in name)
    if change == "missing":
        del state[expert]
    elif change == "extra":
        state[expert.replace(".3.", ".4.")] = state[expert].clone()
    else:
        save_file({expert: state[expert].clone()}, tmp_path / "model" / "again.safetensors")
        path.rename(tmp_path / "model" / "first.safetensors")
    if change != "twice":
        save_file(state, path)
    with pytest.raises(UserError, match="expert") as caught:
        load_model.load_model(model, tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_parts_that_the_model_has_not_are_counted_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from litgpt.model import registry

    model = write_random_model(tmp_path / "model", "Llama-2-7b-hf")
    path = tmp_path / "model" / "model.safetensors"
    extra = {f"model.layers.{layer}.extra.weight": torch.ones(3) for layer in (2, 3)}
    save_file({**load_file(path), **extra}, path)
    with pytest.raises(UserError, match="no tensor of this name"):
        load_model.load_model(model, tmp_path / "model")
    llama = registry.load_families()["llama"]
    tables = {
        **registry.load_families(),
        "llama": replace(llama, tensors=replace(llama.tensors, unread=(r".*\.extra\..*",))),
    }
    monkeypatch.setattr(registry, "load_families", lambda: tables)
    messages: list[str] = []
    load_model.load_model(model, tmp_path / "model", warn=messages.append)
    assert len(messages) == 1 and "2 tensors" in messages[0] and "model.layers.2.extra.weight" in messages[0]


def test_a_training_checkpoint_is_a_model_folder_too(tmp_path: Path) -> None:
    import yaml

    model = random_model(small("Llama-2-7b-hf"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, model, None, {}, {"model_config.yaml": yaml.safe_dump(model.config.to_dict())})
    step = checkpoints.commit()
    assert step is not None
    assert_loads(step, model)
    assert Config.from_checkpoint(step) == model.config


def test_a_view_of_a_file_never_changes_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(5000), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    file = MappedFile(tmp_path / "x.safetensors")
    file.view("b").add_(1)
    file.view("a").add_(1)
    file.release("a")
    assert file.view("b").tolist() == [2, 2, 2], "the pages of a neighbour stay"
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the maps of a process are read on Linux only")
def test_lent_parameters_are_the_files_own_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", "pythia-14m")
    path = tmp_path / "model" / "model.safetensors"
    before = path.read_bytes()
    mapped = random_model(model.config, seed=1)
    load_model.load_model(mapped, tmp_path / "model", mmap=True)
    for name, tensor in weights(model).items():
        assert torch.equal(mapped.get_parameter(name), tensor), name
    maps = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    within = {
        name: any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in maps)
        for name, parameter in mapped.named_parameters()
    }
    apart = {name for name in within if name.split(".")[-2] in ("q", "k", "v")}  # published in one matrix
    assert apart and {name for name, inside in within.items() if not inside} == apart
    optimizer = torch.optim.SGD(mapped.parameters(), lr=1.0)
    mapped(torch.arange(5)[None]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(mapped.embedding.weight, model.embedding.weight) and path.read_bytes() == before
    cast = random_model(model.config, seed=1).bfloat16()
    load_model.load_model(cast, tmp_path / "model", mmap=True)
    assert torch.equal(cast.embedding.weight, model.embedding.weight.bfloat16())
