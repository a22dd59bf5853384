import pytest

from lora_ggpo.training.checkpoints import is_whole, last_whole, remove_broken, seal


def _checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"x" * 100)
    (checkpoint / "training_args.bin").write_bytes(b"a pickle")
    return checkpoint


def test_newest_whole_checkpoint_is_found(tmp_path):
    assert last_whole(tmp_path / "absent") is None
    whole, short, unsealed = (_checkpoint(tmp_path, step) for step in (9, 10, 100))
    seal(whole, keep=None)
    seal(short, keep=None)
    assert last_whole(tmp_path) == short
    (short / "weights").write_bytes(b"x" * 99)
    assert last_whole(tmp_path) == whole
    remove_broken(tmp_path)
    assert [path for path in (whole, short, unsealed) if path.exists()] == [whole]


def test_old_checkpoints_go_when_a_new_one_is_sealed(tmp_path):
    first, second = _checkpoint(tmp_path, 9), _checkpoint(tmp_path, 10)
    assert first.exists()
    seal(first, keep=1)
    seal(second, keep=1)
    assert not first.exists()
    assert last_whole(tmp_path) == second
    assert not (second / "training_args.bin").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "weights").write_bytes(b"x" * 50 + b"y" + b"x" * 49),
        lambda folder: (folder / "weights").write_bytes(b"x" * 99),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "optimizer.pt").write_bytes(b"more"),
        lambda folder: (folder / "sealed.json").write_bytes(b'{"weights": 100}'),
        lambda folder: (folder / "sealed.json").write_bytes(b"[" * 100_000),
        lambda folder: (folder / "sealed.json").unlink(),
    ],
)
def test_any_change_breaks_a_checkpoint(tmp_path, change):
    checkpoint = _checkpoint(tmp_path, 1)
    seal(checkpoint, keep=None)
    assert is_whole(checkpoint)
    change(checkpoint)
    assert not is_whole(checkpoint)
    remove_broken(tmp_path)
    assert not checkpoint.exists()
