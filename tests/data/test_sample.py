"""Records: what is accepted, and that each fault is named with its file, number and field."""

from __future__ import annotations

import json

import pytest

from coconut.data.sample import read_samples, record_from_sample, sample_from_record
from coconut.types import DataError

GOOD = {"question": "start a ?", "steps": ["red up b"], "answer": "red"}


def write(path, records) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def test_a_record_becomes_a_sample_and_back() -> None:
    record = GOOD | {"id": "x1", "image": ["a.png", "b.png"], "choices": ["red", "blue"], "note": "ignored"}
    sample = sample_from_record(record, key="0", source="d.json:0", image_root="pics")
    assert (sample.key, sample.steps, sample.choices) == ("x1", ("red up b",), ("red", "blue"))
    assert sample.images == ("pics/a.png", "pics/b.png")
    assert sample_from_record(record_from_sample(sample), key="", source="d.json:0") == sample


def test_id_and_answer_may_be_numbers_and_the_image_one_text() -> None:
    sample = sample_from_record(GOOD | {"id": 17, "answer": 4, "image": "a.png"}, key="0")
    assert (sample.key, sample.answer, sample.images) == ("17", "4", ("a.png",))
    assert sample_from_record(GOOD, key="5").key == "5"


@pytest.mark.parametrize("field", ["question", "steps", "answer"])
def test_a_missing_field_is_named(tmp_path, field: str) -> None:
    bad = {name: value for name, value in GOOD.items() if name != field}
    path = write(tmp_path / "train.json", [GOOD, bad])
    with pytest.raises(DataError, match=rf"train\.json:1: field '{field}' is missing"):
        read_samples(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "red up b"}, "'steps' must be a list of texts, not a text"),
        ({"steps": [1, {}]}, "'steps' must be text, not an object"),
        ({"question": " "}, "'question' is empty"),
        ({"answer": True}, "'answer' must be text, not true/false"),
        ({"answer": "\ud800"}, "'answer' holds half a surrogate"),
        ({"image": {"path": "x"}}, "'image' must be a list"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(change, message: str) -> None:
    with pytest.raises(DataError, match=f"^d.json:3: field {message}"):
        sample_from_record(GOOD | change, key="3", source="d.json:3")


def test_all_faults_are_listed_at_once(tmp_path) -> None:
    records = [{"question": "q"}, GOOD | {"image": "gone.png"}, GOOD | {"id": "k"}, GOOD | {"id": "k"}, 7]
    with pytest.raises(DataError) as error:
        read_samples(write(tmp_path / "d.json", records))
    message = str(error.value)
    assert "\n" not in message
    for part in ("4 faults", "d.json:0: field 'steps', 'answer'", "gone.png", "d.json:3: id 'k'", "d.json:4"):
        assert part in message
    with pytest.raises(DataError, match=r"and 15 more$"):
        read_samples(write(tmp_path / "d.json", [{}] * 25))


def test_jsonl_and_its_faulty_line(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    odd = GOOD | {"question": "line\u2028separator"}
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(odd, ensure_ascii=False)}\n", encoding="utf-8")
    samples = read_samples(path)
    assert [sample.key for sample in samples] == ["0", "1"]
    assert samples[1].question == odd["question"]
    path.write_text(f"{json.dumps(GOOD)}\n{{oops\n")
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: not JSON"):
        read_samples(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "line 1: not JSON"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep"),
        ("{}", "holds an object"),
        ("[]", "zero samples"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"d\.json.*{message}"):
        read_samples(path)


def test_missing_file_and_image_root(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        read_samples(tmp_path / "nowhere.json")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"")
    path = write(tmp_path / "d.json", [GOOD | {"image": "a.png"}])
    assert read_samples(path, image_root=pictures)[0].images == (str(pictures / "a.png"),)
    with pytest.raises(DataError, match=r"d\.json:0: image .*a\.png does not exist \(is image_root right\?\)"):
        read_samples(path)


def test_max_size(tmp_path) -> None:
    path = write(tmp_path / "d.json", [GOOD, GOOD, {}])
    assert len(read_samples(path, max_size=2)) == 2
