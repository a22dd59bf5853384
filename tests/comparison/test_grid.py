"""What a comparison runs, before anything is run."""

import pytest

from lora_ggpo.cli.placement import method_names
from lora_ggpo.comparison.grid import RATE, TUNING_SEED, plan_comparison, plan_study
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.source import parse_source

RECIPE = """\
model: minilm
task: classification
data: movie-reviews
adapter: {r: 4, target_modules: [query], use_dora: true}
ggpo: {sigma: 0.07}
training: {learning_rate: 1e-3, max_steps: 10}
output: ignored
"""


def plan_of(tmp_path, methods, seeds=2, trials=3, vary=(), metric=None, text=RECIPE, overrides=()):
    source = parse_source(text, "r.yaml", overrides)
    return plan_comparison(source, methods.split(","), seeds, trials, vary, metric, tmp_path)


def study_of(tmp_path, methods, axes=(), seeds=2, text=RECIPE):
    grid = plan_study(parse_source(text, "r.yaml"), methods.split(","), seeds, axes, tmp_path)
    assert grid.tuning() == []
    return grid.final()


def test_every_method_gets_the_same_budget_and_rates(tmp_path):
    grid = plan_of(tmp_path, "lora,ggpo,full,dora+lora-plus", trials=5)
    rates = {}
    for method in grid.methods:
        candidates = grid.candidates(method)
        assert len(candidates) == 5
        assert len({tuple(values.items()) for values in candidates}) == 5
        assert candidates == grid.candidates(method)
        rates[method.name] = [values[RATE] / (1e-3 * method.learning_rate) for values in candidates]
    assert all(rate == pytest.approx([1, 2, 0.5, 4, 0.25]) for rate in rates.values())
    assert grid.candidates(grid.methods[1])[0]["ggpo.sigma"] == grid.methods[1].tuned["ggpo.sigma"][0]


def test_each_choice_is_tried_before_any_comes_again(tmp_path):
    grid = plan_of(tmp_path, "flat-lora,ggpo", trials=12)
    found = grid.candidates(grid.methods[1])
    sigmas = [values["ggpo.sigma"] for values in found]
    assert all(set(sigmas[at : at + 4]) == set(grid.methods[1].tuned["ggpo.sigma"]) for at in (0, 4, 8))
    assert all(values not in found[:at] for at, values in enumerate(found))


def test_the_recipe_as_it_stands_keeps_all_digits_of_its_rate(tmp_path):
    grid = plan_of(tmp_path, "lora,recipe", text=RECIPE.replace("1e-3", "1.23456e-3"))
    assert [values[RATE] for values in grid.candidates(grid.methods[1])] == [1.23456e-3, 2.47e-3, 6.17e-4]


def test_recipes_of_methods(tmp_path):
    grid = plan_of(tmp_path, "lora,dora+ggpo,full,head,lora-sam,recipe", seeds=1)
    lora, both, full, head, sam, recipe = [job.recipe for job in grid.final()]
    assert (lora.adapter_fields["use_dora"], lora.ggpo) == (False, None)
    assert lora.adapter_fields["r"] == 4
    assert both.adapter_fields["use_dora"]
    assert (both.ggpo_config(0).rule, both.ggpo_config(0).sigma) == ("relative", 0.1)
    assert (full.adapter, full.freeze_body, full.training_fields["learning_rate"]) == (None, False, 5e-5)
    assert (head.adapter, head.freeze_body) == (None, True)
    assert sam.sam.rho == 0.05
    assert (recipe.ggpo_config(0).sigma, recipe.adapter_fields["use_dora"]) == (0.07, True)


def test_cures_change_the_recipe_by_what_they_say(tmp_path):
    text = RECIPE.replace("max_steps: 10", "num_train_epochs: 5").replace("r: 4", "r: 6, lora_alpha: 12")
    text += "validate_every: 5\n"
    grid = plan_of(tmp_path, ",".join(method_names("cures")), seeds=1, text=text)
    fields = {job.method.name: job.recipe for job in grid.final()}
    trained = {name: recipe.training_fields for name, recipe in fields.items()}
    assert (trained["half-epochs"]["num_train_epochs"], trained["half-epochs"].get("max_steps")) == (2.5, None)
    lower = fields["low-rank"].adapter_fields
    assert (lower["r"], lower["lora_alpha"]) == (2, 3)
    assert fields["dropout"].adapter_fields["lora_dropout"] == 0.1
    assert trained["weight-decay"]["weight_decay"] == 0.1
    assert trained["label-smoothing"]["label_smoothing_factor"] == 0.1
    assert trained["neftune"]["neftune_noise_alpha"] == 5
    assert fields["best-checkpoint"].keep == "best"
    assert trained["lora"]["num_train_epochs"] == 5
    tuned = plan_of(tmp_path, "lora,half-epochs,low-rank", text=text, trials=5).tuning()
    epochs = {run.recipe.training_fields["num_train_epochs"] for run in tuned if run.method.name == "half-epochs"}
    ranks = {
        tuple(map(run.recipe.adapter_fields.get, ("r", "lora_alpha"))) for run in tuned if run.method.name == "low-rank"
    }
    assert epochs == {1.25, 2.5, 3.75}
    assert ranks == {(1, 2), (2, 3), (3, 6)}
    (_, steps) = plan_of(tmp_path, "lora,half-epochs", seeds=1).final()
    assert steps.recipe.training_fields["max_steps"] == 5


def test_tuning_sees_neither_the_test_set_nor_the_seeds(tmp_path):
    grid = plan_of(tmp_path, "lora,ggpo", vary=["data.label_noise=0,0.3", "data.train_size=500"])
    tuning = grid.tuning()
    assert len(tuning) == 3 * 2 * 2
    assert not any(job.recipe.score_test for job in tuning)
    assert {job.seed for job in tuning} == {TUNING_SEED}
    final = grid.final()
    assert all(job.recipe.score_test and job.seed in (0, 1) for job in final)
    assert list(grid.settings) == ["label_noise=0, train_size=500", "label_noise=0.3, train_size=500"]
    assert {job.recipe.data.label_noise for job in final} == {0, 0.3}
    folders = [job.folder for job in [*tuning, *final]]
    assert len(set(folders)) == len(folders)
    assert {job.recipe.training_fields["max_steps"] for job in final} == {10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "lora"}, "at least two different methods"),
        ({"methods": "lora,lora"}, "at least two different methods"),
        ({"methods": "ggop"}, "There is no method 'ggop'; did you mean ggpo"),
        ({"methods": "lora,full+ggpo"}, "'full\\+ggpo' cannot be run here: .*ggpo perturbs an adapter"),
        ({"methods": "lora,ggpo+mgpo"}, "mgpo and ggpo both decide where the gradient is taken"),
        ({"methods": "lora,lora-fa+mgpo"}, "mgpo needs an optimizer that takes steps of A too, which LoRA-FA does not"),
        ({"methods": "lora,full+lora-plus"}, "lora-plus treats A and B"),
        ({"methods": "lora,dora", "trials": 6}, "no 6 different settings to try; use --trials 5"),
        ({"methods": "lora,dora", "vary": ["training.max_steps=1,2"]}, "data.key=value,value"),
        ({"methods": "lora,dora", "vary": ["data.label_noise=0,2"]}, "data.label_noise must be less than 1"),
        ({"methods": "lora,dora", "metric": "bleu"}, "choose one of accuracy"),
        ({"methods": "lora,ggpo", "overrides": ["ggpo.sigma=0.3"]}, "'ggpo.sigma=0.3' would change nothing"),
    ],
)
def test_what_cannot_be_compared(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, **arguments)


def test_a_study_runs_all_combinations_of_any_settings(tmp_path):
    jobs = study_of(tmp_path, "lora,ggpo", ["adapter.r=1,64", "data.label_noise=0,0.3", "training.max_steps=5"])
    assert len(jobs) == len({job.folder for job in jobs}) == 2 * 2 * 2 * 2
    for job in jobs:
        r, noise = job.recipe.adapter_fields["r"], job.recipe.data.label_noise
        assert job.setting == f"r={r}, label_noise={noise:g}, max_steps=5"
        assert job.recipe.training_fields["max_steps"] == 5
        assert job.recipe.training_fields["learning_rate"] == 1e-3
        assert job.recipe.score_test
    assert {job.recipe.adapter_fields["r"] for job in jobs} == {1, 64}


def test_an_axis_goes_before_what_a_method_usually_takes(tmp_path):
    rates = study_of(tmp_path, "ggpo,rslora", ["training.learning_rate=1e-4,1e-2"], seeds=1)
    assert [job.recipe.training_fields["learning_rate"] for job in rates] == [1e-4, 1e-4, 1e-2, 1e-2]
    sigmas = study_of(tmp_path, "ggpo", ["ggpo.sigma=0.01,0.5"], seeds=1)
    assert [job.recipe.ggpo_config(0).sigma for job in sigmas] == [0.01, 0.5]
    assert [job.values["ggpo.sigma"] for job in sigmas] == [0.01, 0.5]
    assert [job.values[RATE] for job in rates] == [1e-4, 1e-4, 1e-2, 1e-2]


def test_rank_0_is_the_model_as_it_is(tmp_path):
    axis = ["adapter.r+adapter.lora_alpha=0,4"]
    none, some = study_of(tmp_path, "ggpo", axis, seeds=1, text=RECIPE + "freeze_head: true\n")
    assert none.recipe.training_fields["learning_rate"] == none.values[RATE] == 0
    assert some.recipe.training_fields["learning_rate"] == some.values[RATE] == 1e-3
    assert (some.recipe.adapter_fields["r"], some.recipe.adapter_fields["lora_alpha"]) == (4, 4)
    with pytest.raises(UserError, match=r"adapter\.r=0 is the model without an adapter.*; set freeze_head: true"):
        study_of(tmp_path, "ggpo", axis)


def test_a_study_leaves_the_test_set_alone_where_its_recipe_does(tmp_path):
    jobs = study_of(tmp_path, "recipe", ["ggpo.rule=paper,relative"], text=RECIPE + "score_test: false\n")
    assert [job.recipe.ggpo_config(0).rule for job in jobs] == ["paper", "relative"] * 2
    assert not any(job.recipe.score_test for job in jobs)


@pytest.mark.parametrize(
    ("methods", "axes", "message"),
    [
        ("", (), "There is no method ''"),
        ("lora,lora", (), "one method or several different ones"),
        ("lora,ggpo", ["ggpo.sigma=0.1"], "--axis ggpo.sigma cannot vary with method lora"),
        ("lora", ["adapter.rank=4"], "adapter.rank is not a setting; did you mean r"),
        ("lora", ["data.label_noise=2"], "data.label_noise must be less than 1"),
    ],
)
def test_what_cannot_be_studied(tmp_path, methods, axes, message):
    with pytest.raises(UserError, match=message):
        study_of(tmp_path, methods, axes)
