"""Show samples of conversations: their text with what is trained marked, their lengths, and what was left out."""

import itertools
import random
from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt.data.examples import ExampleFile, Report
from litgpt.data.instruct import Finetuning
from litgpt.data.labels import Example
from litgpt.data.samples import SampleRows
from litgpt.data.streaming import StreamedRows
from litgpt.data.tokenizer import Tokenizer

TRAINED = ("⟦", "⟧")
"""What stands around a run of tokens that are trained, since a file of the output has no colours."""


def shown(example: Example, tokenizer: Tokenizer) -> Text:
    """A sample's text; runs of tokens that are trained stand in brackets, with their weight if it is not 1."""
    text = Text()
    for weight, run in itertools.groupby(zip(example.ids, example.weights, strict=True), key=lambda pair: pair[1]):
        part = written([int(token) for token, _ in run], tokenizer)
        if weight == 0:
            text.append(part, style="dim")
        else:
            times = "" if weight == 1 else f"×{weight:g}"
            text.append(f"{TRAINED[0]}{part}{TRAINED[1]}{times}", style="bold green")
    return text


def written(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of some tokens, special ones included where the tokenizer can tell."""
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.decode(ids, skip_special_tokens=False)
    return tokenizer.decode(ids)


def print_sets(data: Finetuning) -> None:
    """Print of every set of rows how many were read and left out, and the samples and tokens that they became."""
    table = Table("rows of", "read", "left out", "samples", "tokens", "trained", "length: median", "99 %", "longest")
    reports: list[tuple[str, Report]] = []
    for entry, file in data.made:
        assert isinstance(file, ExampleFile)
        lengths = file.lengths()
        trained = int(file.targets().sum())
        middle, high = np.percentile(lengths, [50, 99]) if len(lengths) else (0, 0)
        numbers = [file.report.rows, file.report.left_out, file.count, file.tokens, trained]
        numbers += [int(middle), int(high), int(lengths.max(initial=0))]
        shown_numbers = [f"{number:,}" for number in numbers]
        if data.tokenize == "lazy":
            shown_numbers[3:] = ["?"] * 5
        table.add_row(entry.rows.name, *shown_numbers)
        reports.append((entry.rows.name, file.report))
    Console().print(table)
    print_reports(reports)


def print_reports(reports: list[tuple[str, Report]]) -> None:
    """Print how many rows of each set were left out, and the first of them."""
    for name, report in reports:
        if report.left_out:
            print(f"{name}: {report}", *(f"  {line}" for line in report.first), sep="\n")


def print_rows(rows: SampleRows | StreamedRows, tokenizer: Tokenizer, number: int, seed: int) -> None:
    """Print some rows, each with the samples in it; of streamed ones, some of those that come first."""
    table = Table(
        "row", "tokens", "trained", "lengths", f"text (trained: {TRAINED[0]}...{TRAINED[1]})", show_lines=True
    )
    chosen = rows.some(number, random.Random(seed))
    print_reports(
        [(name, Report(**one | {"reasons": Counter(one["reasons"])})) for name, one in rows.told().items()]
        if isinstance(rows, StreamedRows)
        else []
    )
    for index, examples in chosen:
        text = Text("\n──── next sample ────\n", style="bold yellow").join(shown(one, tokenizer) for one in examples)
        lengths = [len(example.ids) for example in examples]
        trained = sum(int(np.count_nonzero(example.weights[1:])) for example in examples)
        channels = sorted({example.channel for example in examples if example.channel is not None})
        name = f"{index}" + (f" ({', '.join(channels)})" if channels else "")
        table.add_row(name, str(sum(lengths)), str(trained), ", ".join(map(str, lengths)), text)
    Console().print(table)
