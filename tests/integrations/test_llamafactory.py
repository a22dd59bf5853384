"""`lora-ggpo-llamafactory train` against `llamafactory-cli train`, with the file of the docs."""

import json

import pytest
import yaml

from lora_ggpo.integrations import llamafactory
from tests.integrations.contract import assert_contract, block, run

ROWS = [{"instruction": f"Judge the film {n}.", "input": "", "output": f"It is good {n}."} for n in range(8)]


def test_it_trains_as_the_docs_say(tiny_llama, tmp_path):
    pytest.importorskip("llamafactory")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins" / "torchaudio.py").touch()  # whose wheels want CUDA; needed for audio alone

    def train(name, ggpo, resume):
        settings = yaml.safe_load(block("finetuning_type: lora")) | {
            "model_name_or_path": tiny_llama,
            "dataset": "rows",
            "dataset_dir": str(tmp_path),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 0.01,
            "output_dir": str(tmp_path / name / "out"),
            "logging_steps": 1,
            "save_steps": 1,
            "report_to": "tensorboard",
            "overwrite_cache": True,
            "ggpo": ggpo,
        }
        settings |= {"resume_from_checkpoint": str(resume)} if resume else {}
        if ggpo is None:
            del settings["ggpo"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        module = "llamafactory.cli" if ggpo is None else "lora_ggpo.integrations.llamafactory"
        run(module, "train", f"{name}.yaml", folder=tmp_path)
        return tmp_path / name / "out"

    assert_contract(train, "LLaMA-Factory", "llamafactory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: lora-ggpo-llamafactory train"),
        (["chat", "x.yaml"], "usage: lora-ggpo-llamafactory train"),
        (["train", "--stage", "sft"], "usage: lora-ggpo-llamafactory train"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lora-ggpo-llamafactory", *arguments])
    with pytest.raises(SystemExit) as ended:
        llamafactory.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_several_processes_are_those_of_torchrun(monkeypatch):
    """Each of them gets the same command, and starts no others."""
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    monkeypatch.setattr("sys.argv", ["lora-ggpo-llamafactory", "train", "x.yaml", "ggpo.sigma=0.1"])
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.delenv("RANK", raising=False)
    llamafactory.main()
    module = ["-m", llamafactory.__name__, "train", "x.yaml", "ggpo.sigma=0.1"]
    assert started == [["--standalone", "--nproc-per-node=2", *module]]
    monkeypatch.setenv("RANK", "0")
    assert llamafactory._processes() == 0


@pytest.mark.parametrize(
    ("section", "message"), [(0.1, "must hold settings"), ({"sigam": 1}, "no field 'sigam'"), ({"sigma": -1}, "sigma")]
)
def test_settings_that_are_none(section, message):
    with pytest.raises(llamafactory.UserError, match=message):
        llamafactory._config(section)
