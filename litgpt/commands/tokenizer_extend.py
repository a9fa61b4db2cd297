"""`litgpt tokenizer extend`: add the tokens of image codes to a model, with new rows of embedding and head."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from litgpt.data.media.codes import OWN_NAMES, find_code_names, find_code_tokens, load_ordered_codec
from litgpt.data.read.media import CODES_FOLDER
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import check_unused, staged_folder, write_text
from litgpt.messages import print_message
from litgpt.model.image_codec import GridShape, save_codec
from litgpt.model.init import seeded_generator
from litgpt.recipe.data_commands import TokenizerExtend
from litgpt.store.load_model import iter_tensors, load_config
from litgpt.store.save_model import UNPUBLISHED, write_model_folder

VOCABULARY_PARAMETERS = ("embedding.weight", "head.weight", "head.bias")
ROWS_MULTIPLE = 64  # of the rows of embedding and head, for which matrix products are fast


def run(recipe: TokenizerExtend) -> None:
    """Write the folder of the model with more tokens.

    Raises:
        UserError: if a folder has no model, tokenizer.json or codec, or the tokenizer has such tokens already.
    """
    check_unused(recipe.output_dir)
    tokenizer = Tokenizer(recipe.checkpoint_dir)
    codec = load_ordered_codec(tokenizer, recipe.codec_dir, size=recipe.size)
    config, text = load_config(recipe.checkpoint_dir), None
    tensors = iter_tensors(recipe.checkpoint_dir, config)
    if find_code_names(tokenizer) in (None, OWN_NAMES):
        text, total = add_tokens(tokenizer, codec.shape), tokenizer.id_limit + 2 + codec.shape.codes
        rows = max(-(-total // ROWS_MULTIPLE) * ROWS_MULTIPLE, config.padded_vocab_size or 0)
        config = replace(config, vocab_size=total, padded_vocab_size=rows)
        tensors = extend_rows(tensors, tokenizer.id_limit, rows, recipe.seed)
    with staged_folder(recipe.output_dir) as staged:
        if write_model_folder(staged, config, tensors, tokenizer_dir=recipe.checkpoint_dir) is None:
            print_message(f"{recipe.output_dir}: {UNPUBLISHED}")
        if text is not None:
            write_text(staged / "tokenizer.json", text)
        (staged / CODES_FOLDER).mkdir()
        save_codec(staged / CODES_FOLDER, codec)
        extended = Tokenizer(staged)
        find_code_tokens(extended, codec.shape)
    print(f"{recipe.output_dir}: {extended.id_limit - tokenizer.id_limit:,} tokens more, {extended.id_limit:,} in all")


def add_tokens(tokenizer: Tokenizer, shape: GridShape) -> str:
    """The tokenizer.json of a tokenizer with the tokens of images.

    Raises:
        UserError: if it has one of them already, or is not a tokenizer.json.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    if tokenizer.backend != "huggingface":
        raise UserError(f"checkpoint_dir: {tokenizer.folder} has no tokenizer.json, which tokens are added to")
    names = [OWN_NAMES.begin, OWN_NAMES.end, *(OWN_NAMES.code.format(code) for code in range(shape.codes))]
    if (known := next((name for name in names if tokenizer.find_token(name) is not None), None)) is not None:
        raise UserError(f"checkpoint_dir: {tokenizer.folder} has the token {known} already; give a model without")
    backend = Backend.from_str(tokenizer.processor.to_str())
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if (backend.token_to_id(OWN_NAMES.begin) or 0) < tokenizer.id_limit:
        raise UserError(
            f"checkpoint_dir: {tokenizer.folder} has ids without tokens below {tokenizer.id_limit}, which new ones "
            "would take; give a model without gaps"
        )
    return str(backend.to_str(pretty=True))


def extend_rows(
    tensors: Iterator[tuple[str, Tensor]], tokens: int, rows: int, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model with more rows of embedding and head.

    A new row is the mean of the old ones (Hewitt 2021) and noise of their deviation, so that codes differ from the
    start.

    Args:
        tokens: number of old rows that have a token.
        rows: number of rows of the result.
    """
    for name, tensor in tensors:
        if name not in VOCABULARY_PARAMETERS:
            yield name, tensor
            continue
        old = tensor[:tokens].float()
        noise = torch.empty(rows, *old.shape[1:]).normal_(generator=seeded_generator(f"{seed}/{name}"))
        extended = old.mean(0) + noise * old.std(0)
        extended[:tokens] = old
        yield name, extended.to(tensor.dtype)
