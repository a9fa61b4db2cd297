"""The table of commands: the name of each, its recipe and its function."""

import importlib
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        recipe: `module:name` of the dataclass with its settings, in `litgpt.recipe`.
        module: the module in `litgpt.commands` whose function `run` runs it with a recipe.
        help: the line in `litgpt --help`.
        positionals: the keys that may be given without their names, in order.
        example: a command line for the help, with the files of a user in place.
        first: the keys that the help of a command with many keys describes first.
        check: the function in `litgpt.train.early_checks` that checks a recipe before torch is imported, if any.
        switches: the keys that are true if they are given without a value.
        repeats: whether the last positional may be given several times; the value of its key is a list.
        plans_run: whether files and all other keys are those of a run, which another command would start.
    """

    recipe: str
    module: str
    help: str
    positionals: tuple[str, ...] = ()
    example: str = ""
    first: tuple[str, ...] = ()
    check: str = ""
    switches: tuple[str, ...] = ()
    repeats: bool = False
    plans_run: bool = False

    def import_recipe(self) -> type:
        """Import the dataclass with the settings."""
        return import_object(f"litgpt.recipe.{self.recipe}")


DRY_RUN = "dry_run"
"""The switch of commands that train with which they print the plan of the run instead; no key of a recipe."""
RUN_KEYS = (
    *("data", "out_dir", "train.max_steps", "train.epochs", "train.global_batch_size", "train.micro_batch_size"),
    *("train.max_seq_length", "train.save_interval", "eval.interval", "optimizer.lr", "precision", "devices"),
    *("resume", "logger_name"),
)
PRETRAIN_KEYS = ("tokenizer_dir", "initial_checkpoint_dir", *RUN_KEYS, "train.max_tokens")
CHATS = "--data Conversations --data.sources chats.jsonl"
PREFERENCES = "--data Preferences --data.sources pairs.jsonl"
ALIGN_KEYS = ("preference.loss_type", "preference.beta", "lora_r", "quantize")


def finetune_command(recipe: str, text: str, example: str, *keys: str) -> Command:
    """Describe a command that finetunes; `keys` are described first in its help, before those of all runs."""
    return Command(
        recipe, "finetune", text, ("checkpoint_dir",), example, (*keys, *RUN_KEYS), "check_finetuning", (DRY_RUN,)
    )


def generate_command(
    recipe: str,
    text: str,
    example: str,
    *keys: str,
    module: str = "generate",
    positionals: tuple[str, ...] = ("checkpoint_dir",),
    check: str = "check_generation",
) -> Command:
    """Describe a command that generates text; `keys` are described first in its help, before those of all."""
    first = (*keys, "prompt", "max_new_tokens", "temperature", "top_k")
    return Command(f"generate:{recipe}", module, text, positionals, example, first, check)


COMMANDS = {
    "pretrain": Command(
        "pretrain:Pretrain",
        "pretrain",
        "Pretrain a model on text, from scratch or from existing weights.",
        ("model_name",),
        "litgpt pretrain pythia-14m --data TextFiles --data.train_data_path books"
        " --tokenizer_dir checkpoints/EleutherAI/pythia-14m --train.max_tokens 1e8",
        PRETRAIN_KEYS,
        check="check_pretraining",
        switches=(DRY_RUN,),
    ),
    "finetune": finetune_command(
        "finetune:FinetuneLora",
        "Finetune a model on conversations, with LoRA or another tuner.",
        f"litgpt finetune Qwen/Qwen3-0.6B {CHATS} --train.epochs 1",
        "lora_r",
        "lora_alpha",
        "quantize",
    ),
    "finetune_lora": finetune_command(
        "finetune:FinetuneLora",
        "Same as finetune.",
        f"litgpt finetune_lora Qwen/Qwen3-0.6B {CHATS} --train.epochs 1",
        "lora_r",
        "lora_alpha",
        "quantize",
    ),
    "finetune_full": finetune_command(
        "finetune:FinetuneFull",
        "Finetune all or some of the weights of a model.",
        f"litgpt finetune_full Qwen/Qwen3-0.6B {CHATS} --train.epochs 1 --optimizer.lr 1e-5",
    ),
    "finetune_adapter": finetune_command(
        "finetune:FinetuneAdapter",
        "Finetune a model with LLaMA-Adapter.",
        f"litgpt finetune_adapter Qwen/Qwen3-0.6B {CHATS} --train.epochs 1",
    ),
    "finetune_adapter_v2": finetune_command(
        "finetune:FinetuneAdapterV2",
        "Finetune a model with LLaMA-Adapter V2.",
        f"litgpt finetune_adapter_v2 Qwen/Qwen3-0.6B {CHATS} --train.epochs 1",
    ),
    "align": finetune_command(
        "align:Align",
        "Train a model on preferences between answers: DPO and its variants, with LoRA or another tuner.",
        f"litgpt align Qwen/Qwen3-0.6B {PREFERENCES} --preference.beta 0.1",
        *ALIGN_KEYS,
    ),
    "dpo": finetune_command(
        "align:Align",
        "Same as align.",
        f"litgpt dpo Qwen/Qwen3-0.6B {PREFERENCES} --preference.beta 0.1",
        *ALIGN_KEYS,
    ),
    "kto": finetune_command(
        "align:AlignKTO",
        "Train a model on answers that are rated as desirable or not (KTO).",
        "litgpt kto Qwen/Qwen3-0.6B --data Preferences --data.sources rated.jsonl",
        *ALIGN_KEYS,
    ),
    "rm": finetune_command(
        "align:AlignReward",
        "Train a reward model on preferences between answers.",
        f"litgpt rm Qwen/Qwen3-0.6B {PREFERENCES}",
        *ALIGN_KEYS,
    ),
    "chat": Command(
        "chat:Chat",
        "chat",
        "Chat with a model in the terminal.",
        ("checkpoint_dir",),
        "litgpt chat out/finetune/lora/final",
        check="check_generation",
        switches=("multiline",),
    ),
    "generate": generate_command(
        "Generate",
        "Generate text with a model.",
        "litgpt generate out/finetune/lora/final --prompt 'What is a llama?'",
    ),
    "generate_full": generate_command(
        "GenerateFull",
        "Generate text with a model whose weights were all finetuned.",
        "litgpt generate_full Qwen/Qwen3-0.6B --finetuned_path out/finetune/full/final",
        "finetuned_path",
        module="generate_finetuned",
        check="check_finetuned_generation",
    ),
    "generate_adapter": generate_command(
        "GenerateAdapter",
        "Generate text with an adapter of finetune_adapter.",
        "litgpt generate_adapter Qwen/Qwen3-0.6B --adapter_path out/finetune/adapter/final",
        "adapter_path",
        module="generate_finetuned",
        check="check_finetuned_generation",
    ),
    "generate_adapter_v2": generate_command(
        "GenerateAdapterV2",
        "Generate text with an adapter of finetune_adapter_v2.",
        "litgpt generate_adapter_v2 Qwen/Qwen3-0.6B --adapter_path out/finetune/adapter-v2/final",
        "adapter_path",
        module="generate_finetuned",
        check="check_finetuned_generation",
    ),
    "generate_speculatively": generate_command(
        "GenerateSpeculatively",
        "Generate text with a model and a small one that proposes tokens.",
        "litgpt generate_speculatively Qwen/Qwen3-0.6B Qwen/Qwen3-8B --speculative_k 4",
        "speculative_k",
        module="generate_speculatively",
        positionals=("draft_model_checkpoint_dir", "target_model_checkpoint_dir"),
        check="check_speculation",
    ),
    "generate_tp": generate_command(
        "GenerateTP",
        "Generate text with a model whose matrices are split over devices.",
        "litgpt generate_tp Qwen/Qwen3-32B --devices 4",
        "devices",
        module="generate_split",
    ),
    "generate_sequentially": generate_command(
        "GenerateSequentially",
        "Generate text with a model whose layers are split over devices.",
        "litgpt generate_sequentially Qwen/Qwen3-32B --devices 4",
        "devices",
        module="generate_split",
    ),
    "serve": Command(
        "serve:Serve",
        "serve",
        "Serve a model over HTTP, with the routes of OpenAI's API.",
        ("checkpoint_dir",),
        "litgpt serve out/finetune/lora/final --port 8000",
        check="check_generation",
        switches=("stream", "openai_spec"),
    ),
    "evaluate": Command(
        "evaluate:Evaluate",
        "evaluate",
        "Evaluate a model on tasks of lm-eval, or on a text file.",
        ("checkpoint_dir",),
        "litgpt evaluate out/finetune/lora/final --tasks hellaswag,gsm8k --limit 100",
        check="check_generation",
    ),
    "download": Command(
        "store_commands:Download",
        "download",
        "Download a model's weights and tokenizer from the Hugging Face hub.",
        ("repo_id",),
        "litgpt download EleutherAI/pythia-14m",
    ),
    "convert_to_litgpt": Command(
        "store_commands:ConvertToLitgpt",
        "convert_to_litgpt",
        "Convert .bin, lit_model.pth or GGUF files, or a training checkpoint, to a model folder.",
        ("checkpoint_dir",),
        "litgpt convert_to_litgpt checkpoints/EleutherAI/pythia-14m",
        check="check_model",
    ),
    "convert_from_litgpt": Command(
        "store_commands:ConvertFromLitgpt",
        "convert_from_litgpt",
        "Export a model as a Hugging Face folder, in LitGPT's format or as a GGUF file; or an adapter for vLLM.",
        ("checkpoint_dir", "output_dir"),
        "litgpt convert_from_litgpt out/pretrain/final exported",
        check="check_model",
    ),
    "convert_pretrained_checkpoint": Command(
        "store_commands:ConvertPretrainedCheckpoint",
        "convert_pretrained_checkpoint",
        "Convert a training checkpoint to a model folder.",
        ("checkpoint_dir", "output_dir"),
        "litgpt convert_pretrained_checkpoint out/pretrain/step-00001000 model",
        check="check_model",
    ),
    "merge_lora": Command(
        "merge_lora:MergeLora",
        "merge_lora",
        "Merge an adapter into its base model.",
        ("checkpoint_dir",),
        "litgpt merge_lora out/finetune/lora/adapter --output_dir merged",
        check="check_model",
    ),
    "validate": Command(
        "store_commands:Validate",
        "validate",
        "Check a model folder: files, config, tokenizer, tensors, memory.",
        ("checkpoint_dir",),
        "litgpt validate checkpoints/EleutherAI/pythia-14m",
        check="check_model",
    ),
    "verify": Command(
        "store_commands:Verify",
        "verify",
        "Compare a model folder with transformers: tensors, logits, tokenizer.",
        ("checkpoint_dir",),
        "litgpt verify checkpoints/EleutherAI/pythia-14m",
        check="check_model",
    ),
    "data prepare": Command(
        "data_commands:DataPrepare",
        "data_prepare",
        "Download and tokenize the data of a run in advance.",
        ("data",),
        "litgpt data prepare TinyStories --tokenizer_dir checkpoints/EleutherAI/pythia-14m",
        check="check_data",
    ),
    "data inspect": Command(
        "data_commands:DataInspect",
        "data_inspect",
        "Show the data of a run: counts, and samples as text.",
        ("data",),
        f"litgpt data inspect {CHATS.removeprefix('--data ')} --tokenizer_dir checkpoints/Qwen/Qwen3-0.6B",
        check="check_data",
    ),
    "tokenizer train": Command(
        "data_commands:TokenizerTrain",
        "tokenizer_train",
        "Train a tokenizer on text, or one of images.",
        ("input", "output_dir"),
        "litgpt tokenizer train books tokenizer --vocab_size 4096",
    ),
    "tokenizer extend": Command(
        "data_commands:TokenizerExtend",
        "tokenizer_extend",
        "Add the tokens of image codes to a model.",
        ("checkpoint_dir", "codec_dir", "output_dir"),
        "litgpt tokenizer extend checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct codes model",
    ),
    "plan": Command(
        "plan:Plan",
        "plan",
        "Compute the memory and the time that a run will need, without a GPU and without weights.",
        ("command",),
        example="litgpt plan --config config_hub/pretrain/tinyllama.yaml --gpu H100-80GB",
        switches=("json", "savings", "search", "check_step"),
        plans_run=True,
    ),
    "report": Command(
        "report:Report",
        "report",
        "Write a self-contained HTML report of a run, or the comparison of several.",
        ("out_dir", "others"),
        "litgpt report out/finetune/lora",
        repeats=True,
    ),
    "board": Command(
        "board:Board",
        "board",
        "Show the runs below a folder in the browser, and start, stop and resume runs.",
        ("folder",),
        "litgpt board out",
    ),
    "init": Command(
        "starting_recipe:Init",
        "init",
        "Write a commented recipe for a task, a model and a machine.",
        ("output",),
        "litgpt init recipe.yaml --task finetune --model Qwen/Qwen3-0.6B --dataset chats.jsonl --gpus 1",
    ),
    "recipes": Command(
        "hub_commands:Recipes",
        "recipes",
        "List the recipes that come with the package, for --config.",
        ("prefix",),
        "litgpt recipes finetune/qwen",
    ),
    "recipes show": Command(
        "hub_commands:RecipesShow",
        "recipes_show",
        "Print one of these recipes.",
        ("name",),
        "litgpt recipes show quickstart > recipe.yaml",
    ),
    "explain": Command(
        "explain:Explain",
        "explain",
        "Translate a launch script of Megatron-SWIFT or ms-swift to a recipe.",
        ("file",),
        "litgpt explain launch.sh > recipe.yaml",
        switches=("list",),
    ),
    "schema": Command(
        "schema:Schema",
        "schema",
        "Print the JSON Schema of the recipe of one or all commands, for editors.",
        ("command", "subcommand"),
        "litgpt schema pretrain > pretrain.schema.json",
    ),
}


def import_object(path: str) -> Any:
    """Import the object at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
