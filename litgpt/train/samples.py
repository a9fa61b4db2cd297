"""What a model writes during a run: after prompts, and about images that it was not trained on."""

import json
from collections.abc import Callable
from typing import Any

from litgpt.data.media.codes import open_code_reader
from litgpt.data.tokenizer import Tokenizer
from litgpt.files import write_text
from litgpt.model.code_tokens import GridConstraint
from litgpt.parallel.strategy import is_rank_zero
from litgpt.train.evaluate import sample_continuation
from litgpt.train.setup import Run

SAMPLES_FILE = "samples.jsonl"


class SampleWriter:
    """Generates the samples of a run, prints them, and appends them to its file. All ranks call it together.

    Args:
        notify: prints a text.
    """

    def __init__(self, run: Run, notify: Callable[[str], None]) -> None:
        self.run, self.notify = run, notify
        self.path = run.recipe.out_dir / SAMPLES_FILE
        self.shown = set[int]()  # the questions whose images this process has written to the file

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        tokenizer = self.run.data.tokenizer
        assert tokenizer is not None
        return tokenizer

    def write_text(self, step: int, prompt: list[int], tokens: int) -> None:
        """Continue a prompt by at most this number of tokens."""
        run, tokenizer = self.run, self.tokenizer
        start = prompt or [tokenizer.bos_id or tokenizer.eos_id or 0]
        codes = open_code_reader(tokenizer)
        constraint = None if codes is None else GridConstraint(codes.tokens, run.spec.config.padded_vocab_size or 0)
        continuation = self._continue(start, tokens, constraint=constraint)
        if not is_rank_zero():
            return
        text = tokenizer.decode(start + continuation)
        lines = [line for line in text.splitlines() if line.strip()]  # blank ones are in the file only
        self.notify("\n".join([f"step {step}, sample:", *lines]))
        row: dict[str, Any] = {"step": step, "prompt": tokenizer.decode(prompt), "text": text}
        if codes is not None and codes.codec.can_draw:
            row["images"] = [codes.draw_as_uri(image) for image in codes.tokens.find_images(continuation)]
        self._append(row)

    def answer_questions(self, step: int, tokens: int) -> None:
        """Answer the questions about images of the run, each by at most this number of tokens.

        Raises:
            UserError: if an image cannot be read any more.
        """
        for number, question in enumerate(self.run.data.image_questions):
            # a window that moved on would cut an image
            fitting = min(tokens, self.run.data.sequence_length - len(question.ids) + 1)
            continuation = self._continue(question.ids, fitting, prompt_batch=question.load())
            if is_rank_zero():
                prompt, target = (self.tokenizer.decode(ids) for ids in (question.text_ids, question.target))
                answer = self.tokenizer.decode(continuation).strip()
                self.notify(f"step {step}, {question.name}: {answer}; in the data: {target.strip()}")
                row = {"step": step, "prompt": prompt, "text": prompt + answer, "question": number, "target": target}
                if number not in self.shown:
                    row["seen"] = question.draw_thumbnails()
                self._append(row)
            self.shown.add(number)

    def _continue(self, start: list[int], tokens: int, **settings: Any) -> list[int]:
        run = self.run
        settings |= {"window": run.data.sequence_length, "seed": run.recipe.seed, "stop_tokens": run.data.stop_ids}
        return sample_continuation(run.train_state, start, max_new_tokens=tokens, **settings)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)

    def remove_after(self, step: int) -> None:
        """Remove the samples generated after a step, from which a run resumes; all samples for a new run (step 0)."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and step and json.loads(line)["step"] <= step]
            write_text(self.path, "".join(kept))
