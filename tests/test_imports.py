"""The floors of the house, as pyproject.toml has them: imports run downwards, and in no circle."""

from pathlib import Path

from importlinter import cli

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_imports_run_downwards_and_in_no_circle(capsys):
    code = cli.lint_imports(config_filename=str(PROJECT), no_cache=True, is_debug_mode=False)
    assert code == 0, capsys.readouterr().out
