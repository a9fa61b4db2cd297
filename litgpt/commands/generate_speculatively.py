"""`litgpt generate_speculatively`: the texts of a model, with the proposals of a small one."""

from functools import partial
from typing import Any

from litgpt.api import LLM
from litgpt.generation import load_llm, write_texts
from litgpt.infer.engine import Engine
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.speculative import check_draft
from litgpt.messages import print_message
from litgpt.recipe.generate import GenerateSpeculatively


def run(recipe: GenerateSpeculatively) -> None:
    """Load both models, generate the samples, and print how many proposed tokens were accepted."""
    llm = write_texts(recipe, partial(load_with_draft, recipe))
    engine = llm.kept_engine.engine
    if engine is not None and engine.draft is not None and engine.draft.proposed:
        proposed, accepted = engine.draft.proposed, engine.draft.accepted
        print_message(f"Acceptance rate: {accepted / proposed:.2f} ({accepted} of {proposed} proposed tokens)")


def load_with_draft(recipe: GenerateSpeculatively) -> LLM:
    """The target model, whose engine has the draft.

    Raises:
        UserError: if their numbers of tokens differ.
    """
    draft = load_llm(recipe.draft_model_checkpoint_dir, recipe)
    llm = load_llm(recipe.target_model_checkpoint_dir, recipe)
    check_draft(draft.model, llm.model)
    settings: dict[str, Any] = {"draft": draft.model, "speculative_k": recipe.speculative_k, "compile": recipe.compile}
    llm.kept_engine = KeptEngine(build=partial(Engine, **settings))
    return llm
