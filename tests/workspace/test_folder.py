"""A folder that work is done in: whose it is, and what it holds."""

import json

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.workspace.folder import claim, differences, lock

SETTINGS = {"size": (1, 2), "model": {"name": "a", "rate": 0.1}}


def claimed(folder, settings, **options):
    with claim(folder, settings, "an evaluation with other settings", **options):
        return json.loads((folder / "settings.json").read_text())


def test_settings_are_written_and_found_again(tmp_path):
    folder = tmp_path / "new" / "folder"
    written = claimed(folder, SETTINGS, further={"versions": "1"})
    assert written == {"size": [1, 2], "model": {"name": "a", "rate": 0.1}, "versions": "1"}
    assert claimed(folder, SETTINGS, further={"versions": "2"}) == {**written, "versions": "2"}
    assert claimed(folder, SETTINGS) == {**written, "versions": "2"}


def test_what_differs_is_said(tmp_path):
    claimed(tmp_path, SETTINGS)
    said = (
        f"{tmp_path} holds an evaluation with other settings: size is [1, 2] there and [1, 3] here; "
        "model.rate is 0.1 there and not set here; choose another --output."
    )
    with pytest.raises(UserError) as error:
        claimed(tmp_path, {"size": (1, 3), "model": {"name": "a"}})
    assert str(error.value) == said
    assert claimed(tmp_path, SETTINGS)


def test_a_folder_with_nothing_begun_may_change_its_settings(tmp_path):
    claimed(tmp_path, {"size": 1}, begun="*.json*")
    assert claimed(tmp_path, {"size": 2}, begun="*.json*") == {"size": 2}
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(UserError, match="size is 2 there and 3 here"):
        claimed(tmp_path, {"size": 3}, begun="*.json*")


def test_a_setting_that_an_earlier_release_did_not_write_down_is_added(tmp_path):
    claimed(tmp_path, {"size": 1})
    assert claimed(tmp_path, {"size": 1, "day": None}) == {"size": 1, "day": None}


def test_a_setting_that_is_missing_is_another_one(tmp_path):
    """Unless it is named as new: the results there may have been made with any value of it."""
    claimed(tmp_path, {"size": 1})
    with pytest.raises(UserError, match="day is None there and 2026-01-31 here"):
        claimed(tmp_path, {"size": 1, "day": "2026-01-31"})
    assert claimed(tmp_path, {"size": 1, "day": "2026-01-31"}, new=("day",))["day"] == "2026-01-31"


def test_results_without_their_settings_are_refused(tmp_path):
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(UserError, match=r"settings\.json cannot be read"):
        claimed(tmp_path, SETTINGS, begun="*.json*")
    assert not (tmp_path / "settings.json").exists()


def test_damaged_settings_are_said(tmp_path):
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match=r"settings\.json is damaged: it holds no settings; choose another --output"):
        claimed(tmp_path, SETTINGS)


def test_a_folder_in_use_is_left_alone(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="is in use by another process"):
        claimed(tmp_path, SETTINGS)
    assert not (tmp_path / "settings.json").exists()


def test_differences_are_of_settings_one_by_one():
    one, other = {"a": {"b": 1, "c": {}}, "d": [1]}, {"a": {"b": 1.0, "c": {}}, "d": [2], "e": None}
    assert list(differences(one, other, [("e",)])) == [("a.b", 1, 1.0), ("d", [1], [2])]
