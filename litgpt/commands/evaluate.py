"""`litgpt evaluate`: scores of a model on tasks of lm-eval, a text or prompts, as a table, JSON and a page."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from litgpt.api import LLM
from litgpt.errors import UserError
from litgpt.files import read_utf8, write_text
from litgpt.generation import iter_row_texts
from litgpt.infer.evaluation_page import list_scores, print_scores, write_page
from litgpt.infer.exact_match import read_scored_prompts, score_prompts
from litgpt.infer.load import convert_model, parse_batch_size, parse_device, parse_dtype, select_dtype
from litgpt.infer.perplexity import compute_perplexity
from litgpt.infer.tasks import open_tasks
from litgpt.messages import print_message
from litgpt.recipe.commands import import_object
from litgpt.recipe.evaluate import Evaluate
from litgpt.recipe.generate import GenerationSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def run(recipe: Evaluate) -> None:
    """Evaluate the model, print the scores and write them; or print the names of the tasks.

    Raises:
        UserError: if a task, the text, the prompts or the model is not found.
    """
    if recipe.tasks is None and recipe.text is None and recipe.prompts is None:
        print(*open_tasks([], recipe.include_path).all_tasks, sep="\n")
        return
    if recipe.force_conversion:
        print_message("force_conversion: true has no effect, because no model is converted")
    text = None if recipe.text is None else read_utf8(recipe.text)
    prompts = None if recipe.prompts is None else read_scored_prompts(recipe.prompts)
    tasks = None if recipe.tasks is None else open_tasks(recipe.task_names, recipe.include_path)
    device = parse_device(recipe.device)
    llm = LLM.load(recipe.checkpoint_dir, access_token=recipe.access_token, distribute=None)
    convert_model(llm.model, device, parse_dtype(recipe.dtype) or select_dtype(device))
    results: dict[str, Any] = {} if tasks is None else evaluate_tasks(recipe, llm, tasks)
    if text is not None:
        results["text"] = {"file": str(recipe.text)} | score_text(recipe, llm, text)
    if prompts is not None and recipe.prompts is not None:
        settings = GenerationSettings(max_new_tokens=recipe.max_new_tokens, temperature=0.0)
        scored = score_prompts(recipe.prompts, prompts, partial(iter_row_texts, llm, settings))
        results |= scored | {"samples": results.get("samples", {}) | scored["samples"]}
    write_scores(recipe, llm, results)


def score_text(recipe: Evaluate, llm: LLM, text: str) -> dict[str, Any]:
    """The perplexity of a text."""
    tokenizer = llm.tokenizer
    ids = tokenizer.encode(text, bos=False).tolist()
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:  # the first token has no context then, and is not scored
        first, *ids = ids or [0]
    size = len(text.encode())
    return asdict(
        compute_perplexity(llm.model, ids, first, byte_count=size, window=recipe.window, stride=recipe.stride)
    )


def evaluate_tasks(recipe: Evaluate, llm: LLM, tasks: "TaskManager") -> dict[str, Any]:
    """The results of lm-eval."""
    from lm_eval import simple_evaluate

    if recipe.chat_template and llm.chat is None:
        raise UserError(f"chat_template: true, but {llm.tokenizer.folder} has none; set false")
    model_class = import_object("litgpt.infer.harness:HarnessModel")  # it needs lm-eval, which a text does not
    model = model_class(llm.model, llm.tokenizer, llm.chat, batch_size=parse_batch_size(recipe.batch_size))
    limit = recipe.limit
    results = simple_evaluate(
        model=model,
        tasks=tasks.match_tasks(recipe.task_names),
        num_fewshot=recipe.num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        use_cache=None if recipe.use_cache is None else str(recipe.use_cache),
        system_instruction=recipe.sys_prompt,
        apply_chat_template=recipe.chat_template,
        task_manager=tasks,
        random_seed=recipe.seed,
        numpy_random_seed=recipe.seed,
        torch_random_seed=recipe.seed,
        fewshot_random_seed=recipe.seed,
    )
    return dict(results)


def write_scores(recipe: Evaluate, llm: LLM, results: Mapping[str, Any]) -> None:
    """Print the scores; write them, the samples and the page."""
    folder = llm.checkpoint_dir
    assert folder is not None
    out_dir = recipe.out_dir or (folder if folder.is_dir() else folder.parent) / "evaluate"
    file = recipe.save_filepath or out_dir / "results.json"
    kept = {key: value for key, value in results.items() if key != "samples"}
    kept["checkpoint_dir"] = str(folder)
    write_text(file, format_json(kept, indent=2))
    print_scores(list_scores(results))
    if samples := results.get("samples"):
        lines = (format_json({"task": task} | row) for task, rows in samples.items() for row in rows)
        write_text(out_dir / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    facts = {"Model": str(folder), "Parameters": f"{sum(p.numel() for p in llm.model.parameters()):,}"}
    facts |= {key: str(value) for key, value in asdict(recipe).items() if key in SHOWN and value is not None}
    write_page(out_dir / "report.html", llm.config.name, facts, results)
    print(f"Scores: {file}\nReport: {out_dir / 'report.html'}")


SHOWN = ("max_new_tokens", "num_fewshot", "limit", "chat_template", "window", "stride", "dtype", "seed")
"""The settings that the page shows, if they are set."""


def format_json(value: Any, indent: int | None = None) -> str:
    """JSON of the results of lm-eval; what JSON has no form for becomes text."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)
