"""What nearly every run imports and builds, once in the server process that the runs of tests are forks of."""

import jinja2  # noqa: F401
import pydantic.fields  # noqa: F401
import tokenizers  # noqa: F401

import litgpt.data.cache.token_shards
import litgpt.data.modules.instruction_sets
import litgpt.data.modules.text
import litgpt.plan.out_of_memory
import litgpt.recipe.show
import litgpt.train.report  # noqa: F401
from litgpt.model.registry import load_families
from litgpt.recipe.build import build_parser
from litgpt.recipe.commands import COMMANDS

load_families()
for name in ("pretrain", "finetune_lora", "finetune_full"):
    build_parser(COMMANDS[name].import_recipe())
