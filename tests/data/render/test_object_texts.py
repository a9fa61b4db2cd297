"""Names and boxes of objects: each family's form, and rows that are equal to those written by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import litgpt.model
from litgpt.data import Conversations
from litgpt.data.cache.lazy_examples import restore_conversation
from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.fields import BadRow, dump_json
from litgpt.data.render.object_texts import write_objects
from litgpt.data.tokenizer import Tokenizer
from litgpt.recipe.data import BatchShape
from tests.data.read.faults import check_fault
from tests.vision_model import draw_image, write_rows, write_vision_model

SHAPE = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=256, rank=0, ranks=1, seed=0)
OBJECTS = {"ref": ["dog", "cat {x}"], "bbox": [[331.5, 761.4, 853.5, 1594.8], [0, 30]]}
QUESTION, ANSWER = "<image>Find the <ref-object> and the <ref-object>.", "At <bbox>, at <bbox>."


def build_row(objects: Any, question: str = QUESTION, answer: str = ANSWER, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["a.png"], "objects": objects, **columns}


def write(objects: Any, family: str | None, sizes: list[Any], **columns: Any) -> list[str]:
    """The texts of a row; the sizes are those of each image, and what it is resized to."""
    form = None
    if family is not None:
        text = (Path(litgpt.model.__file__).parent / "families" / f"{family}.yaml").read_text()
        form = yaml.safe_load(text)["vision"].get("fixed", {}).get("objects")
    conversation = write_objects(to_conversation(build_row(objects, **columns)), form, lambda image: sizes[image])
    assert conversation.objects is None
    return [message.content[-60:] for message in conversation.messages]


FORMS = [
    ("qwen2_vl", "<|object_ref_start|>dog<|object_ref_end|>", "<|box_start|>(192,441),(494,923)<|box_end|>"),
    ("qwen2_5_vl", "dog", "[332, 769, 855, 1611]"),
    ("qwen3_vl", "dog", "[192, 441, 494, 923]"),
    ("internvl", "<ref>dog</ref>", "<box>[[192, 441, 494, 923]]</box>"),
    ("paligemma", "dog", "<loc0451><loc0196><loc0945><loc0506>"),
    ("llava", "dog", "[(192,441),(494,923)]"),
    (None, "dog", "[(192,441),(494,923)]"),
]


@pytest.mark.parametrize(("family", "name", "box"), FORMS)
def test_forms_of_families(family: str | None, name: str, box: str) -> None:
    objects, sizes = {"ref": ["dog"], "bbox": OBJECTS["bbox"][:1]}, [((1728, 1728), (1746, 1732))]
    texts = write(objects, family, sizes, question="the <ref-object>.", answer="It is at <bbox>.")
    assert texts[0].endswith(f"the {name}.") and texts[1] == f"It is at {box}."


def test_points_fractions_and_several_images() -> None:
    sizes = [((100, 200), (56, 112)), ((50, 40), (28, 28))]
    objects = {"ref": [], "bbox": [[50, 25], [20, 25, 40, 50], [0, 0, 40, 50]], "image_id": [0, 1, 1]}
    texts = {"question": "<bbox>", "answer": "<bbox><bbox>", "images": ["a.png", "b.png"]}
    assert write(objects, None, sizes, **texts)[1] == "[(500,500),(1000,1000)][(0,0),(1000,1000)]"
    assert write(objects, "qwen2_vl", sizes, **texts)[0].endswith("<|box_start|>(250,250)<|box_end|>")
    assert write(objects, "qwen2_5_vl", sizes, **texts)[1] == "[14, 14, 28, 28][0, 0, 28, 28]"
    relative = {"bbox": [[0.25, 0.25], [0.5, 0.5, 1, 1], [0, 0, 1, 1.0]], "bbox_type": "norm1"}
    for family in (None, "qwen2_vl"):
        assert write(relative, family, sizes, **texts) == write(objects, family, sizes, **texts)
    assert (
        write(relative | {"image_id": [0, 1, 1]}, "qwen2_5_vl", sizes, **texts)[1] == "[14, 14, 28, 28][0, 0, 28, 28]"
    )


def test_texts_that_are_not_tags() -> None:
    names = {"ref": ["dog", "{corners} <bbox> \\1"], "bbox": [[1, 2], [3, 4]]}
    question, answer = write(names, None, [((10, 10), (10, 10))])
    assert (
        question.endswith("Find the dog and the {corners} <bbox> \\1.") and answer == "At [(100,200)], at [(300,400)]."
    )
    plain = to_conversation(build_row(OBJECTS, "which?", "red"))
    assert plain.objects is None and plain.unread == ("objects",)
    plain = to_conversation(build_row(None))
    assert plain.objects is None and plain.messages[1].content == ANSWER


BAD: list[tuple[Any, str]] = [
    ({"ref": ["dog"], "bbox": OBJECTS["bbox"]}, "not one <ref-object> for each object"),
    ({"ref": OBJECTS["ref"], "bbox": OBJECTS["bbox"] * 2}, "not one <bbox> for each object"),
    (OBJECTS | {"bbox": [[1, 2, 3], [1, 2]]}, "box that is not two or four numbers"),
    (OBJECTS | {"bbox": [[1, 2, float("nan"), 4], [1, 2]]}, "box that is not two or four numbers"),
    (OBJECTS | {"bbox": [["1", 2, 3, 4], [1, 2]]}, "box that is not two or four numbers"),
    (OBJECTS | {"bbox": [5, [1, 2]]}, "box that is not two or four numbers"),
    (OBJECTS | {"bbox": [[5, 2, 3, 4], [1, 2]]}, "box whose right or bottom is before its left or top"),
    (OBJECTS | {"bbox": [[-1, 2, 3, 4], [1, 2]]}, "box outside of its image"),
    (OBJECTS | {"bbox": [[0.1, 0.2, 0.3, 1.4], [1, 1]], "bbox_type": "norm1"}, "box outside of its image"),
    (OBJECTS | {"bbox_type": "norm1000"}, "box of an unknown type"),
    (OBJECTS | {"image_id": [0, 1]}, "box of an image that the row does not have"),
    (OBJECTS | {"image_id": [0, 0, 0]}, "box of an image that the row does not have"),
    (OBJECTS | {"ref": ["dog", 3]}, "objects.ref is not text"),
    (OBJECTS | {"bbox": "none"}, "objects are not lists"),
    ([[1, 2, 3, 4]], "objects are not a mapping of ref and bbox"),
    ("{", "objects: not JSON"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_boxes(number: int) -> None:
    objects, reason = BAD[number]
    check_fault(build_row(objects), reason)


def test_a_row_without_images() -> None:
    row = build_row(OBJECTS, question=QUESTION.removeprefix("<image>"))
    check_fault({name: value for name, value in row.items() if name != "images"}, "objects without an image")


def test_a_box_that_is_too_large() -> None:
    with pytest.raises(BadRow, match=r"box outside of its image \(\[5, 5, 11, 9\] in 10 x 20 pixels\)"):
        write({"bbox": [[5, 5, 11, 9]]}, None, [((20, 10), (8, 4))], question="Where?", answer="<bbox>")


@pytest.mark.parametrize("kind", ["qwen2_vl", "internvl", "llava"])
@pytest.mark.parametrize("tokenize", ["ahead", "lazy"])
def test_rows_are_those_written_by_hand(kind: str, tokenize: Any, tmp_path: Path) -> None:
    model = write_vision_model(tmp_path / "model", kind)
    draw_image(tmp_path / "a.png", (1, 2, 3), (24, 16))
    good = {"bbox": [[6, 4, 12, 8]], "ref": ["dog"]}
    name, box = {
        "qwen2_vl": ("<|object_ref_start|>dog<|object_ref_end|>", "<|box_start|>(250,250),(500,500)<|box_end|>"),
        "internvl": ("<ref>dog</ref>", "<box>[[250, 250, 500, 500]]</box>"),
        "llava": ("dog", "[(250,250),(500,500)]"),
    }[kind]
    batches, reports = [], []
    for number, rows in enumerate(
        (
            [build_row(good, "<ref-object>?", "<bbox>"), build_row({"bbox": [[0, 0, 25, 9]]}, "Where?", "<bbox>")],
            [build_row(None, f"{name}?", box), build_row(None, "Where?", "")],
        )
    ):
        write_rows(tmp_path, rows)
        options = {"val_fraction": 0.0, "num_workers": 0, "shuffle": False, "on_error": "drop", "tokenize": tokenize}
        data = Conversations(str(tmp_path / "rows.jsonl"), cache_dir=tmp_path / f"cache{number}", **options)
        data.connect(Tokenizer(model), 1, SHAPE.max_seq_length)
        data.prepare_data()
        batches.append(next(iter(data.train_stream(SHAPE))))
        reports.append(next(iter(data.report().values()))["reasons"])
    assert batches[0].ids.equal(batches[1].ids) and batches[0].labels.equal(batches[1].labels)
    if tokenize == "ahead":
        assert reports[0] == {"box outside of its image": 1}


def test_objects_of_a_conversation_are_restored() -> None:
    conversation = to_conversation(build_row(OBJECTS))
    assert conversation.objects is not None
    restored = restore_conversation(json.loads(dump_json(asdict(conversation))))
    assert restored.objects == conversation.objects
