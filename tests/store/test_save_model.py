"""Model folders: transformers loads what is written, what others wrote is loaded or refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_family
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from tests.store.models import MODELS, assert_loads, lit_state, random_model, small, weights


def write(folder: Path, model: GPT, **settings: object) -> Path:
    save_model_folder(folder, config=model.config, tensors=weights(model), **settings)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_write_and_we_load_it_back(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(small(MODELS[name]))
    folder = write(tmp_path / "model", model, shard_bytes=20_000 if name == "llama" else 5e9)
    assert (folder / "model.safetensors").exists() == (name != "llama")
    hf_model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(24).view(2, 12) % 50
    with torch.no_grad():
        assert (hf_model.eval()(ids).logits - model(ids)).abs().max() < 1e-4
    assert_loads(folder, model)


def test_a_folder_that_transformers_wrote_loads(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    hf_model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, max_position_embeddings=32, **shape)).eval()
    hf_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = GPT(Config.from_checkpoint(tmp_path)).eval()
    load_model(model, tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert (hf_model(ids).logits - model(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma"])
@pytest.mark.parametrize("form", ["raw", "model", "training", "compiled"])
def test_a_litgpt_folder_loads_in_every_form(tmp_path: Path, name: str, form: str) -> None:
    model = random_model(small(MODELS[name]))
    state: dict[str, object] = dict(lit_state(model))
    if form == "compiled":
        state = {f"_orig_mod.{key}": value for key, value in state.items()}
    if form in ("model", "training"):
        state = {"model": state}
    if form == "training":
        state |= {"optimizer": {"state": {}, "param_groups": []}, "iter_num": 3, "step_count": 3}
    torch.save(state, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(json.dumps(model.config.to_dict()))
    assert_loads(tmp_path, model)


def test_the_interleaved_qkv_of_old_litgpt_files_loads(tmp_path: Path) -> None:
    model = random_model(small(MODELS["llama"]))
    state = lit_state(model)
    size, groups = 8, 2
    for layer in range(2):
        fused = state.pop(f"transformer.h.{layer}.attn.qkv.weight")
        q, k, v = fused.split([4 * size, groups * size, groups * size])
        rows = []
        for group in range(groups):
            rows += [q[group * 2 * size : (group + 1) * 2 * size], k[group * size :][:size], v[group * size :][:size]]
        state[f"transformer.h.{layer}.attn.attn.weight"] = torch.cat(rows)
    torch.save(state, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(json.dumps(model.config.to_dict()))
    assert_loads(tmp_path, model)


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_load_when_there_are_no_safetensors(tmp_path: Path, shards: int) -> None:
    model = random_model(small(MODELS["gpt_neox"]))
    folder = write(tmp_path / "model", model)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        names = sorted(state)
        places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in names if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_loads(folder, model)


def test_a_shape_that_nobody_publishes_keeps_our_names_and_says_so(tmp_path: Path) -> None:
    config = small(MODELS["llama"], norm_class_name="LayerNorm", parallel_residual=True)
    assert find_family(config) is None
    messages: list[str] = []
    model = random_model(config)
    folder = write(tmp_path / "model", model, warn=messages.append)
    assert len(messages) == 1 and "only litgpt" in messages[0]
    assert not (folder / "config.json").exists()
    assert "embedding.weight" in load_file(folder / "model.safetensors")
    assert_loads(folder, model)


def test_a_cast_is_written_as_its_type_and_the_folder_is_never_half_there(tmp_path: Path) -> None:
    model = random_model(small(MODELS["llama"]))
    folder = write(tmp_path / "model", model, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="not empty"):
        write(folder, model)
    write(folder, model, replace=True)
    assert_loads(folder, model)
    lacking = {name: tensor for name, tensor in weights(model).items() if name != "norm.weight"}
    with pytest.raises(UserError, match=r"norm\.weight: missing"):
        save_model_folder(tmp_path / "other", config=model.config, tensors=lacking)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tokenizer_travels_with_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM

    source = tmp_path / "tokenizer"
    source.mkdir()
    Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(str(source / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = write(tmp_path / "model", random_model(small(MODELS["llama"])), tokenizer_dir=source)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 1)
    assert loaded.generation_config.eos_token_id == 1
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def load_changed(tmp_path: Path, change: object) -> str:
    """The message for a Llama folder whose tensors `change` has spoilt."""
    folder = write(tmp_path / "model", random_model(small(MODELS["llama"])))
    state = load_file(folder / "model.safetensors")
    change(state)  # type: ignore[operator]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(GPT(Config.from_checkpoint(folder)), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    row = "model.layers.0.self_attn.q_proj.weight"
    cases = {
        "lacks blocks.0.attention.q.weight": lambda state: state.pop(row),
        "extra.weight: no tensor": lambda state: state.update({"extra.weight": torch.zeros(1)}),
        f"{row} is [3, 32]": lambda state: state.update({row: torch.zeros(3, 32)}),
        f"{row} is of type torch.int64": lambda state: state.update({row: torch.zeros(32, 32, dtype=torch.int64)}),
        "tokens.weight is [70, 32]": lambda state: state.update({"model.embed_tokens.weight": torch.zeros(70, 32)}),
        "lm_head.weight is [9, 32]": lambda state: state.update({"lm_head.weight": torch.zeros(9, 32)}),
        "model.layers.9": lambda state: state.update({"model.layers.9.input_layernorm.weight": torch.zeros(32)}),
    }
    for number, (message, change) in enumerate(cases.items()):
        error = load_changed(tmp_path / str(number), change)
        assert message in error or ("layers.9" in message and "blocks.9" in error), error


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    model = random_model(small(MODELS["llama"], tie_embeddings=True))
    folder = write(tmp_path / "model", model)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    head = state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": head}, folder / "model.safetensors")
    assert_loads(folder, model)
    head[3, 4] += 1
    save_file(state | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match="tie_embeddings: false"):
        load_model(GPT(model.config), folder)
