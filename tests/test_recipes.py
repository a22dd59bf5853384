import shutil
from pathlib import Path

import pytest

from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.tasks import TASKS
from lora_ggpo.training.build import training_arguments
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import write_rows

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_in_the_repository_are_valid(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.resolved(0)["seeds"] == [0]
    training_arguments(recipe, tmp_path, 0)


def test_the_two_movie_review_recipes_differ_by_the_method_alone():
    names = ("movie-reviews-lora.yaml", "movie-reviews-ggpo.yaml")
    lora, ggpo = (load_recipe(RECIPES[0].parent / name).resolved(0) for name in names)
    assert {key for key in lora if lora[key] != ggpo[key]} == {"ggpo", "output"}


def chat(n, answer):
    return [{"role": "user", "content": f"Name colour {n}."}, {"role": "assistant", "content": answer}]


ROWS = {
    "arc-choice": lambda n: {
        "id": f"q{n}",
        "question": f"Which is {n}?",
        "choices": {"text": [f"{n}.", f"{n + 1}."], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "preferences-dpo": lambda n: {  # as UltraFeedback has them
        "chosen": chat(n, "Blue."),
        "rejected": chat(n, "No."),
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_recipes_for_data_of_the_hub_run_on_such_rows(name, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    source = write_rows(tmp_path / "rows.jsonl", map(ROWS[name], range(20)))
    less = [f"model={folder}", f"data={source}", f"output={tmp_path / 'runs'}", "training.max_steps=1"]
    run = train(
        load_recipe(RECIPES[0].parent / f"{name}.yaml", [*less, "training.use_cpu=true"]), Reporter(quiet=True)
    )[0]
    assert set(run.metrics["evaluation"]["test"]) == set(TASKS[run.recipe["task"]["kind"]].metrics)
